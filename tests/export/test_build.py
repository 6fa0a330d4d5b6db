"""The export from a checkpoint to a file: what is written, and that nothing is left behind when anything fails."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from petseg.checkpoint import Checkpoint, save_checkpoint
from petseg.data import Split, find
from petseg.evaluate import evaluate, open_model
from petseg.reference import torch_run
from petseg_export import ExportConfig, OnnxConfig, OpenVINOConfig, TensorRTRTXConfig, build, export
from petseg_export.registry import FORMATS, format_of
from petseg_runtime import parity
from petseg_runtime.artifact import Artifact, open_artifact
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import (
    CheckpointError,
    DataError,
    EngineError,
    InputError,
    OutputError,
    ParityError,
    ParityNames,
    ParityShapes,
    ParityTolerance,
    PetsegError,
    UnreadableImage,
    UsageError,
)
from petseg_runtime.parity import Proof, Tolerance, load_proof, proof_of
from petseg_runtime.spec import ModelSpec
from petseg_runtime.verify import verify_artifact

CONFIGS: list[type[ExportConfig]] = [OnnxConfig, OpenVINOConfig]
BEFORE = b"the file of an earlier export"


@pytest.fixture
def checkpoint_copy(checkpoint_file: Path, tmp_path: Path) -> Path:
    """A copy of the session's checkpoint in a new folder."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(checkpoint_file, tmp_path / "run" / "best.safetensors"))


@pytest.fixture
def with_split(trained: Any, meta: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint that was trained with a quarter of the photos for validation."""
    path = tmp_path / "split" / "best.safetensors"
    config = {"data": {"val_fraction": 0.25, "split_seed": 7}}
    save_checkpoint(path, trained.model.state_dict(), {**meta, "config": config})
    return path


def content(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder and below, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limit file sizes to `room` bytes: writing fails as on a full disk (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -------------------------------------------------------------------------------------------------- written files


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (OnnxConfig(), ["best.onnx", "best.onnx.parity.npz"]),
        (OpenVINOConfig(), ["best.xml", "best.bin", "best.xml.json", "best.xml.parity.npz"]),
    ],
    ids=["onnx", "openvino"],
)
def test_the_files_are_written_beside_the_checkpoint_and_listed(
    config: ExportConfig, names: list[str], checkpoint_copy: Path, known_graph: None
) -> None:
    done = export(str(checkpoint_copy), config)
    assert done.path == checkpoint_copy.with_name(names[0])
    assert done.files == tuple(checkpoint_copy.with_name(name) for name in names)
    assert set(content(checkpoint_copy.parent)) == {"best.safetensors", *names}
    assert set(build._output_files(done.path, format_of(config)[0])) == set(done.files), "checked for overwriting"
    artifact = open_artifact(done.path)
    assert artifact.receipt == json.loads(json.dumps(done.receipt.as_dict()))
    assert artifact.receipt["passed"] is True


@pytest.mark.parametrize("config", [OnnxConfig(precision="fp16"), OpenVINOConfig(), OpenVINOConfig(precision="fp16")])
def test_a_second_export_gives_the_same_bytes(config: ExportConfig, checkpoint_copy: Path, known_graph: None) -> None:
    """Everything except the tracing, which `test_cli` repeats: photos, receipt, parity record, compiler."""
    made = []
    for _ in range(2):
        export(checkpoint_copy, config)
        made.append(content(checkpoint_copy.parent))
        if made[-1].pop("best.xml", None):  # OpenVINO numbers layers across all models of a process
            sidecar = json.loads(made[-1].pop("best.xml.json"))
            del sidecar["files"][".xml"]
            made[-1]["best.xml.json"] = json.dumps(sidecar).encode()
    assert made[0] == made[1]


@pytest.mark.parametrize("config", CONFIGS)
def test_missing_folders_are_created(
    config: type[ExportConfig], checkpoint_file: Path, tmp_path: Path, known_graph: None
) -> None:
    suffix = ".onnx" if config is OnnxConfig else ".xml"
    done = export(checkpoint_file, config(output=tmp_path / "a" / "b" / f"out{suffix}"))
    assert done.receipt.passed
    assert done.path.is_file()
    assert all(file.parent == tmp_path / "a" / "b" for file in done.files)


def test_the_parity_record_ships_with_the_file_and_verifies_it(
    exported: Any, checkpoint_file: Path, trained: Any, photos: list[Path]
) -> None:
    artifact = open_artifact(exported.file)
    proof = load_proof(proof_of(exported.file), artifact.spec, artifact.provenance["checkpoint_sha256"])
    chosen = np.linspace(0, len(photos) - 1, 16).round().astype(int)  # evenly spaced, because a data set is sorted
    assert proof.names == tuple(photos[i].name for i in chosen), "as many as a full receipt needs"
    assert (proof.expected == torch_run(trained.model)(proof.images)).all()
    assert (artifact.receipt["identity"], artifact.receipt["proof"]) == (artifact.identity, proof.identity)
    receipt = verify_artifact(artifact)
    assert receipt.passed
    assert receipt.kind == "full"
    assert receipt.reference == exported.receipt.reference


def test_a_parity_record_of_few_photos_contains_them_all(checkpoint_copy: Path, known_graph: None) -> None:
    done = export(checkpoint_copy, OnnxConfig(photos=3))
    assert verify_artifact(open_artifact(done.path)).names == done.receipt.names
    assert done.receipt.photos == 3
    assert done.receipt.kind == "smoke"


def test_each_requested_engine_has_rows(checkpoint_copy: Path, oxford_root: Path, known_graph: None) -> None:
    config = OnnxConfig(backends=("onnxruntime", "openvino"), data=oxford_root / "images")
    rows = export(checkpoint_copy, config).receipt.rows
    assert [row.engine.split()[0] for row in rows][:2] == ["onnxruntime", "openvino"]
    assert {row.engine.split()[0] for row in rows} == {"onnxruntime", "openvino"}
    assert [row.precision for row in rows[:2]] == ["f32", "f32"], "the exact rows come first"
    assert all(row.passed for row in rows)


def test_the_parity_test_uses_the_requested_device_and_threads(
    checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(artifact: Artifact, backend: str, threads: int | None, *, device: str, **more: Any) -> Engine:
        asked.append((backend, threads, device))
        return load_engine(artifact, backend, threads, device=device, **more)

    monkeypatch.setattr(parity, "load_engine", load)
    export(checkpoint_copy, OnnxConfig(photos=1, backends=("onnxruntime",), threads=3, device="cpu"))
    assert asked == [("onnxruntime", 3, "cpu")], "loaded once, because it always computes float32 in float32"
    asked.clear()
    export(checkpoint_copy, OpenVINOConfig(photos=1, threads=3, device="cpu"))
    assert set(asked) == {("onnxruntime", 3, "cpu"), ("auto", 3, "cpu")}, "the graph, and the IR made from it"


@pytest.mark.parametrize(
    ("size", "largest", "other"),
    [
        ((256, 256), None, (240, 224)),
        ((32, 32), None, (16, 16)),
        ((16, 48), None, (32, 16)),
        ((16, 16), None, (32, 32)),
        ((16, 16), (16, 32), (16, 32)),
        ((16, 16), (16, 16), None),
        ((64, 64), (64, 64), (48, 32)),
    ],
)
def test_a_dynamic_size_graph_is_tested_at_a_second_size(
    size: tuple[int, int], largest: tuple[int, int] | None, other: tuple[int, int] | None
) -> None:
    height, width = size
    assert build._another_size(ModelSpec(name="x", height=height, width=width, dynamic_size=True), largest) == other
    assert build._another_size(ModelSpec(name="x", height=height, width=width), largest) is None


@pytest.mark.parametrize("format_name", ["onnx", pytest.param("trt-rtx", marks=pytest.mark.tensorrt)])
def test_a_file_that_runs_only_at_the_smallest_size_is_not_written(
    format_name: str, checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the specification's size is 16 x 16, the smallest; and if only the graph can be run here."""
    if format_name == "trt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")

    def load(*args: Any, **options: Any) -> Any:
        engine = load_engine(*args, **options)
        honest = engine.run
        engine.run = lambda batch: honest(batch) // (1 if batch.shape[1:3] == (16, 16) else 2)
        return engine

    monkeypatch.setattr(parity, "load_engine", load)
    config = FORMATS[format_name].config(height=16, width=16, dynamic_size=True, photos=3)
    with pytest.raises(ParityTolerance, match=r"FAILED.*at another size: largest difference"):
        export(checkpoint_copy, config)
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


def test_progress_is_reported_per_stage(checkpoint_copy: Path, known_graph: None) -> None:
    told: list[tuple[str, int, int]] = []
    export(checkpoint_copy, OpenVINOConfig(photos=2), lambda *step: told.append(step))
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages == [
        "reading",
        "reference in PyTorch",
        "tracing the network",
        "parity test of the graph",
        "compiling with openvino",
        "parity test",
        "scanning activations",
    ]
    assert [(done, total) for what, done, total in told if what == "reference in PyTorch"] == [(1, 2), (2, 2)]


def test_a_compilation_for_the_parity_test_is_a_stage(
    checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def compiles(artifact: Artifact, *args: Any, tell: Callable[[str], None], **more: Any) -> Engine:
        tell("TensorRT builds an engine, a long text")
        return load_engine(artifact, *args, tell=tell, **more)

    monkeypatch.setattr(parity, "load_engine", compiles)
    export(checkpoint_copy, OnnxConfig(photos=1), lambda what, done, total: told.append(what))
    stages = list(dict.fromkeys(told))
    assert stages[stages.index("parity test") - 1] == "compiling for the parity test, can take minutes"


# ------------------------------------------------------------------------------------------------ labelled photos


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_receipts_iou_matches_petseg_evaluate(
    config: type[ExportConfig], split: str, with_split: Path, trained: Any, oxford_root: Path, known_graph: None
) -> None:
    """On the split of the checkpoint's training, in every row."""
    done = export(with_split, config(data=oxford_root, split=split))
    pairs = find(oxford_root, Split(split), val_fraction=0.25, seed=7)
    assert done.receipt.names == tuple(pair.name for pair in pairs)
    want = evaluate(torch_run(trained.model), pairs, 32, 32).counts(0.6).iou
    assert want > 0.8
    for row in done.receipt.rows:
        assert row.task is not None
        assert row.task["photos"] == len(pairs) == 6
        assert row.task["reference"] == pytest.approx(want, abs=1e-12)
        assert row.task["loss"] == pytest.approx(100 * (want - row.task["this"]), abs=1e-4)
    with open_model(done.path) as model:  # in the engine of the last row, at its default precision
        this = evaluate(model.run, pairs, model.height, model.width, batch=1).counts(model.threshold).iou
    assert done.receipt.rows[-1].task["this"] == pytest.approx(this, abs=1e-12)


def test_a_receipt_on_possible_training_photos_says_so(
    trained: Any, meta: dict[str, Any], tmp_path: Path, oxford_root: Path, known_graph: None
) -> None:
    path, data = tmp_path / "best.safetensors", {"names_sha256": "0" * 64, "skipped_without_pet": []}
    save_checkpoint(path, trained.model.state_dict(), {**meta, "data": data})
    done = export(path, OnnxConfig(data=oxford_root, backends=("onnxruntime",)))
    said = "is not what the model was validated on: photos that it was trained on may be among val"
    assert said in done.receipt.note
    assert [note.endswith(f"{said}; the IoU on such photos is optimistic") for note in done.notes] == [True]
    test = export(path, OnnxConfig(data=oxford_root, split="test", backends=("onnxruntime",)))
    assert (test.receipt.note, test.notes) == ("", ())


def test_autos_choice_has_a_row_next_to_the_exact_one(
    checkpoint_copy: Path, oxford_root: Path, known_graph: None
) -> None:
    engine = pytest.importorskip("petseg_runtime.engines.openvino")
    with pytest.MonkeyPatch.context() as patch:  # undone before tests/conftest.py's `any_cpu` is
        patch.setattr(engine, "computes_in_less", lambda spec, options: not options.exact)
        patch.setattr(engine, "_NAMES", {"f32": "bf16", "bf16": "bf16"})  # as on a CPU with bf16
        exact, left_alone = export(checkpoint_copy, OnnxConfig(data=oxford_root / "images")).receipt.rows
    assert (exact.engine.split()[0], exact.precision) == ("onnxruntime", "f32")
    assert (left_alone.engine.split()[0], left_alone.precision) == ("openvino", "bf16")


@pytest.mark.parametrize(("height", "width", "warned"), [(32, 32, False), (16, 32, True), (32, 48, True)])
def test_another_size_than_the_trained_one_is_reported(
    meta: dict[str, Any], height: int, width: int, warned: bool
) -> None:
    spec = ModelSpec(name="x", height=height, width=width)
    notes = build._size_notes(Path("best.safetensors"), Checkpoint({}, meta, "0" * 64), spec)
    assert [f"trained at 32 x 32; at {height} x {width} its masks" in note for note in notes] == [True] * warned


def test_photos_without_labels_have_no_iou(exported: Any) -> None:
    assert [row.task for row in exported.receipt.rows] == [None]


# ------------------------------------------------------------------------------------------------ bad checkpoints


def _flip(data: bytes) -> bytes:
    """Flip a byte in the middle of the JSON header."""
    return data[:40] + bytes([data[40] ^ 0xFF]) + data[41:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:-1000],
        lambda data: data + b"more",
        lambda data: _flip(data),
        lambda data: b"\x89PNG\r\n\x1a\n" + data[8:],
        lambda data: b"\xff" * len(data),
    ],
    ids=["empty", "8 bytes", "truncated", "longer", "header", "PNG", "garbage"],
)
def test_a_damaged_checkpoint_is_rejected(checkpoint_copy: Path, spoil: Callable[[bytes], bytes]) -> None:
    spoilt = spoil(checkpoint_copy.read_bytes())
    checkpoint_copy.write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=r"run/best\.safetensors: not a readable safetensors checkpoint"):
        export(checkpoint_copy, OnnxConfig())
    assert content(checkpoint_copy.parent) == {"best.safetensors": spoilt}


def test_a_foreign_file_is_rejected_as_a_checkpoint(tmp_path: Path, exported: Any) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    shutil.copy(exported.file, tmp_path / "other.onnx.safetensors")
    before = content(tmp_path)
    for name in before:
        with pytest.raises(CheckpointError, match=name):
            export(tmp_path / name, OnnxConfig(output=tmp_path / "out.onnx"))
    assert content(tmp_path) == before


@pytest.mark.parametrize("width", [2, 6, 64, 10**6, 3, 0, "4"])
def test_a_checkpoint_whose_width_contradicts_its_header_is_rejected(
    trained: Any, meta: dict[str, Any], tmp_path: Path, width: Any
) -> None:
    path = tmp_path / "odd.safetensors"
    save_checkpoint(path, trained.model.state_dict(), {**meta, "model": {"width": width}})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: .*(do not fit|does not describe) [^\n]*$"):
        export(path, OnnxConfig())
    assert list(content(tmp_path)) == ["odd.safetensors"]


def test_a_training_state_file_is_rejected_with_a_remedy(trained: Any, tmp_path: Path) -> None:
    state = {f"ema/{name}": tensor for name, tensor in trained.model.state_dict().items()}
    save_checkpoint(tmp_path / "last.safetensors", state, {"kind": "training", "model": {"width": 4}})
    with pytest.raises(CheckpointError, match=r"last\.safetensors: .*best\.safetensors"):
        export(tmp_path / "last.safetensors", OnnxConfig())
    assert list(content(tmp_path)) == ["last.safetensors"]


@pytest.mark.parametrize(
    "damaged",
    [
        {"spec": {"height": 32}},
        {"spec": {"height": 33, "width": 32}},
        {"spec": 5},
        {"validation": 5},
        {"versions": 5},
        {"config": 5},
        {"config": {"data": 5}},
        {"config": {"data": {"val_fraction": "x"}}},
    ],
    ids=str,
)
def test_an_invalid_header_gives_a_one_line_error_naming_the_file(
    trained: Any, meta: dict[str, Any], oxford_root: Path, tmp_path: Path, damaged: dict[str, Any], known_graph: None
) -> None:
    path = tmp_path / "odd.safetensors"
    save_checkpoint(path, trained.model.state_dict(), {**meta, **damaged})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: ") as caught:
        export(path, OnnxConfig(data=oxford_root))
    assert "\n" not in str(caught.value)
    assert list(content(tmp_path)) == ["odd.safetensors"]


# ------------------------------------------------------------------------------------- unusable output paths


@pytest.mark.parametrize(("config", "suffix"), [(OnnxConfig, ".onnx"), (OpenVINOConfig, ".xml")])
@pytest.mark.parametrize("name", ["out", "out.pt", "out.onnx.zip", "out.ONNX", "onnx"])
def test_an_output_with_the_wrong_suffix_is_rejected_immediately(
    config: type[ExportConfig], suffix: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{name}: .* files end in {suffix}"):
        export(tmp_path / "there_is_none.safetensors", config(output=tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("place", ["file/out", "folder"])
def test_an_unwritable_output_raises_output_error(
    config: type[ExportConfig], place: str, checkpoint_file: Path, tmp_path: Path, known_graph: None
) -> None:
    suffix = ".onnx" if config is OnnxConfig else ".xml"
    (tmp_path / "file").write_text("in the way")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(OutputError, match=f"{place}{suffix}: cannot be written"):
        export(checkpoint_file, config(output=tmp_path / f"{place}{suffix}", photos=1))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", f"folder{suffix}"]


@pytest.mark.parametrize(
    ("config", "name"),
    [(OnnxConfig, "best.onnx"), (OpenVINOConfig, "best.xml"), (OpenVINOConfig, "best.bin")],
)
def test_an_export_never_overwrites_its_checkpoint(
    config: type[ExportConfig], name: str, checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_copy.rename(checkpoint_copy.with_name(name))
    before = content(checkpoint_copy.parent)
    monkeypatch.chdir(path.parent)
    for given, output in ((path, None), (Path(name), path.with_suffix(FORMATS[format_of(config())[0]].suffix))):
        with pytest.raises(OutputError, match=rf"{name}: the export would overwrite its source"):
            export(given, config(output=output))
    assert content(checkpoint_copy.parent) == before


def test_an_export_never_overwrites_the_given_onnx_file(exported: Any, checkpoint_copy: Path) -> None:
    given = Path(shutil.copy(exported.file, checkpoint_copy.with_name("x.bin")))
    before = content(given.parent)
    with pytest.raises(OutputError, match=r"x\.bin: the export would overwrite its source"):
        export(checkpoint_copy, OpenVINOConfig(onnx=given, output=given.with_suffix(".xml")))
    assert content(given.parent) == before


def test_an_exported_file_given_as_checkpoint_is_named_as_such(exported: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(exported.file, tmp_path / "mine.onnx"))
    with pytest.raises(CheckpointError, match=r"mine\.onnx: .*give the \.safetensors file that it was made from"):
        export(path, OnnxConfig())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_created_is_an_output_error(checkpoint_file: Path, known_graph: None) -> None:
    with pytest.raises(OutputError, match=r"/proc/petseg/out\.onnx: cannot be written"):
        export(checkpoint_file, OnnxConfig(output=Path("/proc/petseg/out.onnx")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_output_error(
    checkpoint_file: Path, tmp_path: Path, known_graph: None
) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            export(checkpoint_file, OnnxConfig(output=tmp_path / "out.onnx"))
    finally:
        tmp_path.chmod(0o755)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_full_disk_leaves_existing_files_unchanged(
    config: type[ExportConfig], room: int, checkpoint_copy: Path, known_graph: None
) -> None:
    if config is OpenVINOConfig and importlib.metadata.version("openvino") < "2026.2":
        pytest.skip("before 2026.2, OpenVINO does not notice a full disk; the parity test rejects the file")
    suffix = ".onnx" if config is OnnxConfig else ".xml"
    checkpoint_copy.with_suffix(suffix).write_bytes(BEFORE)
    before = content(checkpoint_copy.parent)
    with full_disk(room), pytest.raises(OutputError, match=f"best{suffix}: cannot be written .*File too large"):
        export(checkpoint_copy, config())
    assert content(checkpoint_copy.parent) == before


@pytest.mark.parametrize("config", CONFIGS)
def test_a_disk_full_at_the_last_file_leaves_existing_files_unchanged(
    config: type[ExportConfig], checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Proof, "to_bytes", lambda self: bytes(3_000_000))
    before = content(checkpoint_copy.parent)
    with full_disk(2_000_000), pytest.raises(OutputError, match="File too large"):
        export(checkpoint_copy, config())
    assert content(checkpoint_copy.parent) == before


# -------------------------------------------------------------------------------------- failing parity tests


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_receipt_writes_nothing(
    config: type[ExportConfig], before: bool, checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = ".onnx" if config is OnnxConfig else ".xml"
    if before:
        export(checkpoint_copy, config())
    files = content(checkpoint_copy.parent)
    monkeypatch.setitem(parity.TOLERANCES, "f32", Tolerance(max_difference=-1, min_mask_iou=0.999))
    with pytest.raises(ParityTolerance, match=r"FAILED.*largest difference") as caught:
        export(checkpoint_copy, config())
    assert caught.value.exit_code == 10
    assert content(checkpoint_copy.parent) == files
    assert (checkpoint_copy.with_suffix(suffix) in checkpoint_copy.parent.iterdir()) is before


def test_one_failed_row_fails_the_export(
    checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = build.measure

    def second_fails(*args: Any, **more: Any) -> Any:
        (row,) = honest(*args, **more)
        return row, dataclasses.replace(row, precision="bf16", failures=("off by a mile",))

    monkeypatch.setattr(build, "measure", second_fails)
    with pytest.raises(ParityTolerance, match=r"bf16 in onnxruntime .*: off by a mile"):
        export(checkpoint_copy, OnnxConfig())
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


def test_a_failing_engine_fails_the_export(
    checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise EngineError("out of memory")

    monkeypatch.setattr(build, "measure", failing)
    with pytest.raises(EngineError, match="out of memory"):
        export(checkpoint_copy, OnnxConfig())
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 2.79 TiB for an array"),
    ],
    ids=["torch", "numpy"],
)
def test_running_out_of_memory_is_an_error_with_a_remedy(
    error: Exception, checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example with ``--batch 1000000``."""

    def fail(deployed: Any, spec: ModelSpec) -> bytes:
        raise error

    monkeypatch.setattr(build, "graph_bytes", fail)
    with pytest.raises(EngineError, match=r"out of memory: use a smaller --size or --batch, .*[Aa]llocate"):
        export(checkpoint_copy, OnnxConfig(photos=1))
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


@pytest.mark.parametrize(
    "stage",
    [
        "reference in PyTorch",
        "tracing the network",
        "parity test of the graph",
        "parity test",
        "scanning activations",
    ],
)
def test_an_interruption_at_any_stage_writes_nothing(stage: str, checkpoint_copy: Path, known_graph: None) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(checkpoint_copy, OpenVINOConfig(), interrupt)
    assert sorted(path.name for path in checkpoint_copy.parent.iterdir()) == ["best.safetensors"]


def test_an_unreadable_photo_writes_nothing(checkpoint_copy: Path, oxford_copy: Path, known_graph: None) -> None:
    (oxford_copy / "images" / "pet_29.jpg").write_bytes(b"no photo")
    with pytest.raises(UnreadableImage, match=r"pet_29\.jpg") as unlabelled:
        export(checkpoint_copy, OnnxConfig(data=oxford_copy / "images"))
    with pytest.raises(DataError, match=r"pet_29\.jpg") as labelled:
        export(checkpoint_copy, OnnxConfig(data=oxford_copy, split="test"))
    assert isinstance(unlabelled.value, InputError)
    assert (unlabelled.value.exit_code, labelled.value.exit_code) == (1, 8)
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


def test_an_unreadable_mask_writes_nothing(checkpoint_copy: Path, folder_copy: Path, known_graph: None) -> None:
    (folder_copy / "masks" / "own_10.png").unlink()
    with pytest.raises(DataError, match=r"own_10\.png"):
        export(checkpoint_copy, OnnxConfig(data=folder_copy, split="test"))
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


def renamed(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "picture"


def renamed_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "mask"


def of_float(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def of_another_size(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 48


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (renamed, ParityNames, "picture"),
        (renamed_output, ParityNames, "mask"),
        (of_float, ParityShapes, "float32"),
        (of_another_size, ParityShapes, "48"),
    ],
)
def test_a_graph_that_violates_the_contract_is_a_parity_error(
    change: Callable[[onnx.ModelProto], None],
    error: type[ParityError],
    told: str,
    exported: Any,
    checkpoint_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proto = onnx.load(exported.file)
    change(proto)
    monkeypatch.setattr(build, "graph_bytes", lambda deployed, spec: proto.SerializeToString())
    with pytest.raises(error, match=told):
        export(checkpoint_copy, OnnxConfig())
    assert list(content(checkpoint_copy.parent)) == ["best.safetensors"]


def layer(kind: str, reads: str, writes: str, count: int) -> dict[str, Any]:
    return {"layer": kind, "reads": [reads], "writes": [writes], "count": count}


@pytest.mark.parametrize(
    ("computed", "noted"),
    [
        ([layer("correlation", "int8", "fp32", 35), layer("kgen", "fp32", "int8", 27)], True),
        ([layer("correlation", "int8", "fp16", 2), layer("correlation", "int8", "int8", 1)], True),
        ([layer("correlation", "int8", "int8", 34), layer("correlation", "int8", "fp32", 1)], False),
        ([layer("correlation", "fp16", "fp16", 35), layer("kgen", "int8", "fp32", 4)], False),
        (None, False),
    ],
    ids=["as in RTX 1.7", "most", "the last one only", "fp16", "unknown"],
)
def test_int8_convolutions_that_write_float_are_reported(computed: Any, noted: bool) -> None:
    notes = build._engine_notes({"library": "tensorrt_rtx", "engine": {"computed": computed}})
    assert [note.partition(": ")[2] for note in notes] == (
        ["--precision fp16 is probably faster (not measured by us)"] if noted else []
    )
    assert build._engine_notes({}) == ()


@pytest.mark.tensorrt
def test_an_engines_notes_are_among_those_of_its_export(
    checkpoint_copy: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")

    def compiler(onnx: Artifact, output: Path, config: TensorRTRTXConfig, watch: Any) -> dict[str, Any]:
        output.write_bytes(b"an engine")
        return {"library": "tensorrt_rtx", "engine": {"computed": [layer("correlation", "int8", "fp32", 35)]}}

    monkeypatch.setattr("petseg_export.tensorrt.compile_tensorrt_rtx", compiler)
    monkeypatch.setattr(build, "nvidia_gpus", lambda: 0)
    done = export(checkpoint_copy, TensorRTRTXConfig(photos=1))
    assert any(note.startswith("35 of 35 int8 convolutions write float") for note in done.notes)


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (OnnxConfig(precision="int8"), UsageError),
        (OnnxConfig(backends=("nonsense",)), EngineError),
        (OpenVINOConfig(backends=("onnxruntime",)), EngineError),
    ],
)
def test_an_impossible_request_is_rejected_before_the_checkpoint_is_read(
    config: ExportConfig, error: type[PetsegError], tmp_path: Path
) -> None:
    with pytest.raises(error):
        export(tmp_path / "there_is_none.safetensors", config)


@pytest.mark.parametrize("damaged", [{"validation": 5}, {"versions": 5}])
def test_damaged_training_metadata_is_found_before_any_photo_is_read(
    trained: Any, meta: dict[str, Any], tmp_path: Path, damaged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.safetensors"
    save_checkpoint(path, trained.model.state_dict(), {**meta, **damaged})
    monkeypatch.delattr(build.parity, "read")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: its training metadata is damaged"):
        export(path, OnnxConfig())


def test_every_format_is_tested_on_the_same_photos(checkpoint_copy: Path, oxford_root: Path, known_graph: None) -> None:
    wanted = {"data": oxford_root / "images", "photos": 5, "seed": 3}
    seen = [export(checkpoint_copy, config(**wanted)).receipt.photos_sha256 for config in CONFIGS]
    assert len(set(seen)) == 1
