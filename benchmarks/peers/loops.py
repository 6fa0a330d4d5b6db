"""Turn a folder of photos into black-and-white masks, as users of each library would: one photo after the other.

Or, with ONNX Runtime and OpenVINO, overlay a clip with its masks, as a user who knows Pillow and PyAV would: whole
pictures at a time, frames decoded on all cores.

    python -m benchmarks.peers.loops rembg SESSION MODEL PHOTOS OUTPUT
    python -m benchmarks.peers.loops torch NETWORK WEIGHTS PHOTOS OUTPUT
    python -m benchmarks.peers.loops onnxruntime MODEL PHOTOS OUTPUT
    python -m benchmarks.peers.loops openvino MODEL PHOTOS OUTPUT
    python -m benchmarks.peers.loops openvino MODEL CLIP OUTPUT

Runs in the peers' interpreter. Each library is imported only where it is needed, and uses its default threads.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

F32: TypeAlias = npt.NDArray[np.float32]
#: Maps a normalised photo, float32 [1, 3, H, W], to the probability, float32 [1, H, W].
Network: TypeAlias = Callable[[F32], F32]

#: As in networks.py, whose import would load torch.
SIZE: Final = 256
#: ImageNet's mean and standard deviation, which every pretrained encoder of these libraries expects.
MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)
#: Lookup table that thresholds an output byte at one half.
HALF: Final = [255 * (level >= 128) for level in range(256)]
BLUE: Final = (30, 100, 192)


def rembg(session: str, model: Path, photos: Sequence[Path], output: Path) -> None:
    """rembg's pipeline, with one session for all photos."""
    os.environ["REMBG_HOME"] = str(model.parent)  # rembg reads model files only from there
    os.environ.pop("U2NET_HOME", None)  # it would take precedence
    library = importlib.import_module("rembg")
    opened = library.new_session(session, model_path=str(model))
    for photo in photos:
        with Image.open(photo) as image:
            library.remove(image, session=opened, only_mask=True).save(output / f"{photo.stem}.png")


def plain(network: Network, photos: Sequence[Path], output: Path) -> None:
    """Any network of one class: resize, normalise, run, resize the output to the photo."""
    for photo in photos:
        with Image.open(photo) as image:
            mask_of(network, image.convert("RGB")).save(output / f"{photo.stem}.png")


def mask_of(network: Network, image: Image.Image) -> Image.Image:
    """The black-and-white mask of an RGB picture, at its size."""
    pixels = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    inputs = (np.asarray(pixels, np.float32) / 255 - MEAN) / DEVIATION
    probability = network(np.ascontiguousarray(inputs.transpose(2, 0, 1)[None]))[0]
    answer = Image.fromarray(np.round(255 * probability).astype(np.uint8))
    return answer.resize(image.size, Image.Resampling.BILINEAR).point(HALF)


def clip(network: Network, source: Path, output: Path) -> None:
    """Overlay a clip with its masks in half-transparent blue, encoded as `petseg infer` does by default."""
    av: Any = importlib.import_module("av")
    with av.open(source) as opened, av.open(output, "w") as sink:
        picture = opened.streams.video[0]
        picture.thread_type = "AUTO"  # as in petseg; PyAV's default decodes in parallel by slice, and frames have one
        options = {"preset": "veryfast", "crf": "21"}
        stream = sink.add_stream("libx264", rate=picture.average_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        blue = Image.new("RGB", (stream.width, stream.height), BLUE)
        for frame in opened.decode(video=0):
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            image.paste(Image.blend(image, blue, 0.5), mask=mask_of(network, image))
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        sink.mux(stream.encode(None))


def in_torch(name: str, weights: Path) -> Network:
    """PyTorch in eager mode, as in the libraries' documentation."""
    import torch

    from benchmarks.peers.networks import opened

    network = opened(name, weights)

    def run(inputs: F32) -> F32:
        with torch.inference_mode():
            answer: F32 = network(torch.from_numpy(inputs)).numpy()
        return answer

    return run


def in_onnxruntime(model: Path) -> Network:
    """ONNX Runtime with default options."""
    session: Any = importlib.import_module("onnxruntime").InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]


def in_openvino(model: Path) -> Network:
    """OpenVINO with default options: bf16 where the CPU supports it."""
    compiled: Any = importlib.import_module("openvino").Core().compile_model(model, "CPU")
    return lambda inputs: compiled(inputs)[0]


def main(library: str, *arguments: str) -> None:
    """Run one of the four libraries on a folder, or one of the last two on a clip."""
    *options, source, result = arguments
    output, engines = Path(result), {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
    if Path(source).is_file():
        clip(engines[library](Path(options[0])), Path(source), output)
        return
    photos = sorted(Path(source).iterdir())
    output.mkdir(parents=True, exist_ok=True)
    if library == "rembg":
        rembg(options[0], Path(options[1]), photos, output)
    elif library == "torch":
        plain(in_torch(options[0], Path(options[1])), photos, output)
    else:
        plain(engines[library](Path(options[0])), photos, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
