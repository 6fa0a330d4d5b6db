"""Who takes part in ``python -m benchmarks peers``, and the command that each of them is run with."""

from __future__ import annotations

import json
import re
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
PYTORCH: Final = "PyTorch"

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
        share: Of the photos; a slow one takes the first few, and petseg beside it takes those.
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

    @property
    def every(self) -> int:
        """Rounds from one of its turns to the next: the nearest, which take all photos, have theirs in each."""
        return 1 if self.share == 1 else 2


#: Of the photos, for the slowest, and for PyTorch.
FEW, SOME = 0.06, 0.3
#: Name and file of rembg's models. Their session is the one that takes a file, and does with it what the built-in ones
#: of that network do.
REMBG: Final = (("u2netp", "u2netp.onnx"), ("u2net, its default", "u2net.onnx"))
#: Library, name, what ``networks`` calls it, its share of the photos, and where it is run. Left out are those that say
#: nothing new and take minutes, all of them far behind: rembg's ISNet, a Unet on MobileNetV2 (between DeepLabV3 and
#: FPN), and the larger ones in a second engine. The nearest, on all photos, have their turn in every round.
NETWORKS: Final = (
    (
        "torchvision",
        "lraspp mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
        1.0,
        (PYTORCH, "ONNX Runtime", "OpenVINO"),
    ),
    ("torchvision", "deeplabv3 mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", SOME, ("ONNX Runtime",)),
    ("segmentation-models-pytorch", "FPN resnet34", "fpn_resnet34", SOME, ("OpenVINO",)),
)
#: The engines that petseg has for CPUs.
ENGINES_OF_CPUS: Final = ("onnxruntime", "openvino")


def ours(python: Path) -> Iterator[Contender]:
    """petseg's command and its Python API in a plain loop, in the engine that it chooses and in the other one."""
    spec = open_artifact(default_model()).spec

    def told(backend: str) -> tuple[str, str]:
        said = subprocess.run([python, "-c", TELL, backend], check=True, capture_output=True, text=True).stdout
        name, engine = json.loads(said)
        return name, engine

    chosen = told("auto")
    other = next(name for name in ENGINES_OF_CPUS if name != chosen[0])
    for backend, (name, engine) in (("auto", chosen), (other, told(other))):

        def command(photos: Path, output: Path, backend: str = backend) -> list[str]:
            arguments = ["infer", str(photos), "--as", "mask", "--backend", backend, "--output", str(output), "--quiet"]
            return [str(python.with_name("petseg")), *arguments]

        def plain(photos: Path, output: Path, backend: str = backend) -> list[str]:
            return [str(python), "-c", LOOP, backend, str(photos), str(output)]

        size, needs = (spec.height, spec.width), (f"petseg[{ENGINES[name].extra}]",)
        for how, run in (("petseg infer FOLDER", command), (PLAIN, plain)):
            title = f"petseg, {backend}" + (f", {how}" if how == PLAIN else "")
            yield Contender(title, how, engine, size, "the embedded model", run, "petseg", needs)


def theirs(python: Path) -> Iterator[Contender]:
    """rembg's pipeline; the networks of torchvision and smp in the engines that petseg uses, and one in PyTorch."""
    needs: tuple[str, ...] = ("rembg", "onnxruntime")
    for name, file in REMBG:
        model = MODELS / file
        command = loop(python, "rembg", "u2net_custom", model.resolve())
        how, size = "rembg.remove in a loop, one session", (320, 320)
        yield Contender(f"rembg {name}", how, "ONNX Runtime", size, RANDOM, command, "peers", needs, model, share=FEW)
    for library, name, network, share, engines in NETWORKS:
        weights_file, graph = MODELS / f"{network}.safetensors", MODELS / f"{network}.onnx"
        for engine, command, model, needs in (
            (PYTORCH, loop(python, "torch", network, weights_file), weights_file, (library, "pillow")),
            ("ONNX Runtime", loop(python, "onnxruntime", graph), graph, ("onnxruntime", "numpy", "pillow")),
            ("OpenVINO", loop(python, "openvino", graph), graph, ("openvino", "numpy", "pillow")),
        ):
            if engine not in engines:
                continue
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
                share=SOME if engine == PYTORCH else share,
            )


def engine_of(engine: str) -> str:
    """The engine's name alone, however a contender writes it."""
    return re.split(r"\d", engine.lower().replace(" ", ""), maxsplit=1)[0]


def loop(python: Path, *arguments: str | Path) -> Command:
    """The command for one of the loops."""
    start = [str(python), "-m", "benchmarks.peers.loops", *map(str, arguments)]
    return lambda photos, output: [*start, str(photos), str(output)]
