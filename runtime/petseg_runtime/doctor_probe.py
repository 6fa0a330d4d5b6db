"""``python -m petseg_runtime.doctor_probe QUESTION``: runs the checks of ``petseg doctor`` that may crash or hang.

Each process answers one question. The answer is one JSON object on stdout; it has ``error`` if the question fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from petseg_runtime import host

__all__ = ["QUESTIONS", "main"]

_RUNS: Final = 10

# Decoders for the formats of cameras, phones and the web; encoders for formats that play everywhere.
_DECODERS: Final = ("h264", "hevc", "vp8", "vp9", "libdav1d", "mjpeg", "mpeg4", "png")
_ENCODERS: Final = ("libx264", "libx265", "libvpx", "libvpx-vp9", "libsvtav1", "mjpeg", "ffv1", "png")


def gpus() -> dict[str, Any]:
    """The NVIDIA GPUs that the driver shows, and why it does not start ("" if it does, or there is none)."""
    return {"gpus": [dataclasses.asdict(gpu) for gpu in host.gpus()], "trouble": host.driver_trouble()}


def rule() -> dict[str, Any]:
    """The lines of the rule by which ``auto`` chooses, and what each needs."""
    from petseg_runtime.engines.registry import ENGINES, RULE  # imports numpy, which may be broken

    lines = []
    for choice in RULE:
        entry = ENGINES[choice.engine]
        line = {"engine": choice.engine, "device": choice.kind, "text": str(choice), "module": entry.module}
        compiles = choice.kind == "cuda" and len(entry.formats) > 1  # ONNX, and the engine compiled from it
        lines.append(
            {
                **line,
                "extra": entry.extra_on(choice.kind),
                "run_by_us": choice.kind in entry.run_by_us,
                "compiles": compiles,
            }
        )
    return {"rule": lines}


def auto() -> dict[str, Any]:
    """The engine that ``auto`` loads the built-in model in."""
    from petseg_runtime.artifact import default_model, open_artifact
    from petseg_runtime.engines.registry import load_engine

    with load_engine(open_artifact(default_model())) as engine:
        return {"info": dataclasses.asdict(engine.describe())}


def engine(name: str, device: str, model: str) -> dict[str, Any]:
    """Load a model in one engine, run it on its parity record (on a blank photo if it has none), and time it.

    Returns:
        ``info`` (of :class:`petseg_runtime.engines.base.EngineInfo`), ``load_seconds``, ``milliseconds`` (median of
        a run of one photo), ``parity`` (of :class:`petseg_runtime.parity.Comparison`, None without a parity record),
        and ``photos``, the number of photos in that record.
    """
    import numpy as np

    from petseg_runtime.artifact import open_artifact
    from petseg_runtime.engines.registry import load_engine
    from petseg_runtime.parity import compare, proof_of
    from petseg_runtime.verify import proof_for

    artifact = open_artifact(Path(model))
    spec = artifact.spec
    proof = proof_for(artifact) if proof_of(artifact.path).exists() else None
    photo = proof.images[:1] if proof else np.zeros((1, spec.height, spec.width, 3), np.uint8)
    start = time.perf_counter()
    with load_engine(artifact, name, device=device) as loaded:
        load_seconds = time.perf_counter() - start
        info = loaded.describe()
        parity = compare(loaded.run, info, proof, spec).as_dict() if proof else None
        loaded.run(photo)
        milliseconds = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            loaded.run(photo)
            milliseconds.append(1000 * (time.perf_counter() - start))
    return {
        "info": dataclasses.asdict(info),
        "load_seconds": load_seconds,
        "milliseconds": statistics.median(milliseconds),
        "parity": parity,
        "photos": len(proof.names) if proof else 0,
    }


def intel() -> dict[str, Any]:
    """The devices that OpenVINO sees, with their names."""
    import openvino

    core = openvino.Core()
    return {"devices": {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}}


def ffmpeg() -> dict[str, Any]:
    """The versions of PyAV and its FFmpeg libraries, and which of the codecs that matter they have."""
    import av
    from av.codec import Codec

    def has(name: str, mode: Any) -> bool:
        try:
            Codec(name, mode)
        except ValueError:  # PyAV's UnknownCodecError is a ValueError
            return False
        return True

    return {
        "pyav": av.__version__,
        "libraries": {name: ".".join(map(str, version)) for name, version in av.library_versions.items()},
        "decoders": {name: has(name, "r") for name in _DECODERS},
        "encoders": {name: has(name, "w") for name in _ENCODERS},
    }


QUESTIONS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    question.__name__: question for question in (gpus, rule, auto, engine, intel, ffmpeg)
}


def main(words: list[str]) -> None:
    """Answer the question ``words[0]`` with the other words as its arguments."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # no core dumps
    # Libraries may print to stdout: from here on, that goes to stderr, and only the answer to the original stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = QUESTIONS[words[0]](*words[1:])
    except Exception as error:  # noqa: BLE001 (any exception of a library is the answer; its traceback goes to stderr)
        from petseg_runtime.errors import PetsegError

        if not isinstance(error, PetsegError):
            traceback.print_exc()
        text = " ".join(str(error).split())[:400]
        answer = {"error": text if isinstance(error, PetsegError) else f"{type(error).__name__}: {text}"}
    with answers:
        answers.write(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
