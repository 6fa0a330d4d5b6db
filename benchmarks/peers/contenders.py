"""The contenders of ``python -m benchmarks peers``, and the command of each."""

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

#: Prints which engine petseg chooses; run in petseg's environment.
TELL: Final = """
import json, sys
from petseg_runtime import Segmenter
with Segmenter(backend=sys.argv[1]) as segmenter:
    info = segmenter.describe()
print(json.dumps([info.name, f"{info.name} {info.version}, {info.precision}"]))
"""

#: petseg's Python API in a loop like the peers' (loops.py): one photo after the other.
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

#: Builds the command that turns the photos of one folder into masks in another.
Command: TypeAlias = Callable[[Path, Path], list[str]]


@dataclass(frozen=True)
class Contender:
    """One way to turn photos into masks.

    Attributes:
        name: Name of the row.
        how: What its user runs or writes.
        engine: The engine that computes the network.
        size: Height and width of the network's input.
        weights: Origin of the weights.
        command: Builds its command.
        environment: ``petseg`` or ``peers``.
        needs: The packages that a user of only this contender installs.
        model: The model file, if it is not in a package.
        share: Share of the photos that it processes; slow ones, and petseg beside them, process the first few.
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
        """It takes part in every ``every``-th round; the fastest peers, which process all photos, in each."""
        return 1 if self.share == 1 else 2


#: Shares of the photos for the slowest contenders, and for PyTorch.
FEW, SOME = 0.06, 0.3
#: Name and file of rembg's models. rembg's session for custom files treats them like the built-in ones.
REMBG: Final = (("u2netp", "u2netp.onnx"), ("u2net, its default", "u2net.onnx"))
#: Library, name, name in ``networks``, share of the photos, and engines. Omitted because they take minutes, add nothing
#: new and are far slower: rembg's ISNet, a Unet on MobileNetV2 (between DeepLabV3 and FPN), and the larger networks in
#: a second engine. The fastest, on all photos, takes part in every round.
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
#: petseg's engines for CPUs.
ENGINES_OF_CPUS: Final = ("onnxruntime", "openvino")


def ours(python: Path) -> Iterator[Contender]:
    """petseg's command and its Python API in a plain loop, in the engine that `auto` chooses and in the other one."""
    spec = open_artifact(default_model()).spec

    def engine_for(backend: str) -> tuple[str, str]:
        out = subprocess.run([python, "-c", TELL, backend], check=True, capture_output=True, text=True).stdout
        name, engine = json.loads(out)
        return name, engine

    chosen = engine_for("auto")
    other = next(name for name in ENGINES_OF_CPUS if name != chosen[0])
    for backend, (name, engine) in (("auto", chosen), (other, engine_for(other))):

        def command(photos: Path, output: Path, backend: str = backend) -> list[str]:
            arguments = ["infer", str(photos), "--as", "mask", "--backend", backend, "--output", str(output), "--quiet"]
            return [str(python.with_name("petseg")), *arguments]

        def plain(photos: Path, output: Path, backend: str = backend) -> list[str]:
            return [str(python), "-c", LOOP, backend, str(photos), str(output)]

        size, needs = (spec.height, spec.width), (f"petseg[{ENGINES[name].extra}]",)
        for how, run in (("petseg infer FOLDER", command), (PLAIN, plain)):
            title = f"petseg, {backend}" + (f", {how}" if how == PLAIN else "")
            yield Contender(title, how, engine, size, "the built-in model", run, "petseg", needs)


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
        ways = {
            PYTORCH: (loop(python, "torch", network, weights_file), weights_file, (library, "pillow")),
            "ONNX Runtime": (loop(python, "onnxruntime", graph), graph, ("onnxruntime", "numpy", "pillow")),
            "OpenVINO": (loop(python, "openvino", graph), graph, ("openvino", "numpy", "pillow")),
        }
        for engine in engines:
            command, model, needs = ways[engine]
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
    """The name of the engine without version, in the same form for all contenders."""
    return re.split(r"\d", engine.lower().replace(" ", ""), maxsplit=1)[0]


def loop(python: Path, *arguments: str | Path) -> Command:
    """The command for one of the loops in loops.py."""
    start = [str(python), "-m", "benchmarks.peers.loops", *map(str, arguments)]
    return lambda photos, output: [*start, str(photos), str(output)]
