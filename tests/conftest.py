"""Shared fixtures: tiny data sets, and a separate cache folder per test. Imports neither torch nor an engine."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from petseg_runtime.files import write_atomic

hypothesis.settings.register_profile("petseg", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("petseg")

# A shell starts background jobs with SIGINT ignored, which the processes that tests start and interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same for SIGHUP under nohup: this process still ignores it, with a handler, which child processes do not inherit.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# One test runs per core, and each process that they start would use all cores: threads would wait for each other.
# The environment may set another number; tests of threads set it themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The garbage collector would scan the loaded modules and tests, half a million objects, again and again: a third of the
# time that loading them takes, and at each full collection afterwards, which tests of leaks start themselves.
gc.disable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop() -> Iterator[object]:
    gc.freeze()
    gc.enable()
    try:
        return (yield)
    finally:
        gc.unfreeze()  # otherwise nanobind would report objects that are not freed at exit


SIZE = 64
TRAINVAL, TEST = 24, 6


@contextlib.contextmanager
def any_cpu(item: pytest.Item) -> Iterator[None]:
    """Make ``auto`` choose ONNX Runtime, as on a CPU without bf16, so that receipts have the same rows everywhere.

    The runtime's tests are not affected, because they test that choice.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.path.parent.name in ("export", "petseg") and importlib.util.find_spec("openvino"):
            patch.setattr("petseg_runtime.engines.openvino.computes_in_less", lambda spec, options: False)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:  # fixtures are created in this phase
    with any_cpu(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with any_cpu(item):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def no_shared_cache() -> Iterator[None]:
    """Disable the cache for fixtures of module or session scope, which run before the fixture below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETSEG_CACHE", "")
        yield


@pytest.fixture(scope="session", autouse=True)
def buffered_output() -> Iterator[None]:
    """Commands buffer their output, unlike in most containers: what cannot be written is then tried again at exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        yield


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what a test compiles or caches out of the user's folders and of the next test."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PETSEG_CACHE", str(cache / "petseg"))
    return cache


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by all pytest-xdist workers, for files that are expensive to make. Lock each while making it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared_folder: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder of that name, with the function that is given, unless another worker has done so."""

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = shared_folder / name, shared_folder / f"{name}.made"
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


class Tracer:
    """The exporter's `graph_bytes` with a cache: tracing takes seconds, and depends on a network's structure only.

    The cache is a folder that all workers share: each structure is traced once, by the first worker that needs it, and
    gets the weights of each network.
    """

    def __init__(self, folder: Path, trace: Callable[[Any, Any], bytes]) -> None:
        self.folder, self.trace = folder, trace
        folder.mkdir(exist_ok=True)

    def __call__(self, deployed: Any, spec: Any) -> bytes:
        import onnx

        # With a dynamic size, the smallest example is 32 x 32.
        size = [max(side, 32) if spec.dynamic_size else side for side in (spec.height, spec.width)]
        digest = hashlib.sha256(repr((deployed, size, spec.dynamic_size, spec.batch)).encode())
        weights = {name: tensor.numpy() for name, tensor in deployed.state_dict().items()}
        values = {name: weight.tobytes() for name, weight in weights.items()}
        distinct = len(set(values.values())) == len(values)  # the exporter stores equal tensors only once
        for name, weight in weights.items():
            digest.update(f"{name} {weight.dtype} {weight.shape}".encode() + (b"" if distinct else values[name]))
        known = self.folder / f"{digest.hexdigest()}.onnx"
        with known.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed
            if not known.exists():
                traced = self.trace(deployed, spec)
                write_atomic(known, traced)
                return traced  # unchanged: the exporter's own weights are tested, too
        if not distinct:
            return known.read_bytes()
        proto = onnx.load(known)
        stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, value in values.items():
            assert len(stored[name].raw_data) == len(value)
            stored[name].raw_data = value
        return bytes(proto.SerializeToString())


@pytest.fixture(scope="session")
def tracer(shared_folder: Path) -> Iterator[Tracer]:
    from petseg_export.onnx import graph_bytes

    with pytest.MonkeyPatch.context() as patch:
        # For each graph, torch parses the source of its 500 ONNX functions again: a fifth of the time. Not public, so a
        # torch without it is only slower.
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield Tracer(shared_folder / "graphs", graph_bytes)


@pytest.fixture
def known_graph(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuses traced graphs: a structure that another test has traced is not traced again, which takes seconds."""
    monkeypatch.setattr("petseg_export.build.graph_bytes", tracer)


def draw_pet(index: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Photo uint8 [H, W, 3] and trimap uint8 [H, W]: a warm ellipse on a cool, noisy background, with a border ring."""
    rng = np.random.default_rng(index)
    cy, cx = rng.uniform(0.4, 0.6, 2) * size
    ry, rx = rng.uniform(0.18, 0.32, 2) * size
    y, x = np.mgrid[:size, :size]
    r = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
    trimap = np.where(r < 1, 1, np.where(r < 1.2, 3, 2)).astype(np.uint8)
    colour = np.where((r < 1.1)[..., None], (210, 140, 70), (50, 90, 130))
    photo = np.clip(colour + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    return photo, trimap


def write_oxford(root: Path, trainval: int = TRAINVAL, test: int = TEST) -> Path:
    images, trimaps = root / "images", root / "annotations" / "trimaps"
    images.mkdir(parents=True)
    trimaps.mkdir(parents=True)
    names = [f"pet_{i:02d}" for i in range(trainval + test)]
    for index, name in enumerate(names):
        photo, trimap = draw_pet(index)
        Image.fromarray(photo).save(images / f"{name}.jpg", quality=95)
        Image.fromarray(trimap).save(trimaps / f"{name}.png")
    for split, part in (("trainval", names[:trainval]), ("test", names[trainval:])):
        lines = "".join(f"{name} 1 1 1\n" for name in part)
        (root / "annotations" / f"{split}.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n" + lines)
    return root


@pytest.fixture(scope="session")
def oxford_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 trainval and 6 test photos of 64 x 64 in Oxford-IIIT Pet's layout. Read only; see `oxford_copy`."""
    return write_oxford(tmp_path_factory.mktemp("oxford") / "pets")


@pytest.fixture
def oxford_copy(oxford_root: Path, tmp_path: Path) -> Path:
    """A copy of the same that a test may modify."""
    return Path(shutil.copytree(oxford_root, tmp_path / "oxford_copy"))


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 photos with black-and-white masks in images/ and masks/, three of them listed in test.txt. Read only."""
    root = tmp_path_factory.mktemp("folder") / "own"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for index in range(12):
        photo, trimap = draw_pet(100 + index)
        Image.fromarray(photo).save(root / "images" / f"own_{index:02d}.png")
        Image.fromarray(((trimap == 1) * 255).astype(np.uint8)).save(root / "masks" / f"own_{index:02d}.png")
    (root / "test.txt").write_text("own_09\nown_10\nown_11\n")
    return root


@pytest.fixture
def folder_copy(folder_root: Path, tmp_path: Path) -> Path:
    """A copy of the same that a test may modify."""
    return Path(shutil.copytree(folder_root, tmp_path / "folder_copy"))
