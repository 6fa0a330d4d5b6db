"""Malicious input: any content of a photo or a model file leads to a result or to a documented error.

The inputs are processed in a separate process with limits on memory and time, which reports each input before it
begins, so that a crash or a hang can be attributed. As a script, the fuzzer runs for longer:

    python tests/runtime/test_malformed.py fuzz --runs 100000 --seed 1
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gzip
import importlib.util
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image, features

from petseg_runtime.artifact import PROVENANCE_KEY, Artifact, open_artifact, sidecar_of, sidecar_text
from petseg_runtime.errors import InputError, ModelError, PetsegError
from petseg_runtime.images import read
from petseg_runtime.onnx_metadata import parse
from petseg_runtime.spec import SPEC_KEY, ModelSpec
from raw_files import block, chunk, raw_png, varint

Action: TypeAlias = Callable[[], object]

#: Runs of the fuzzer for each of the two readers, as part of the tests.
RUNS = int(os.environ.get("PETSEG_FUZZ_RUNS", "1500"))
#: Wall time per input; generous, because it must tell a hang from slow work on a busy machine.
SECONDS = 60
#: A picture of as many pixels as the harness allows is held as RGBA, as RGB and in the decoder's internal format.
MAX_PIXELS = 4_000_000
MAX_GROWTH = 400 * 2**20
ADDRESS_SPACE = 4 * 2**30


# ----------------------------------------------------------------------------------------------------- valid files


def encoded(image: Image.Image, kind: str, frames: tuple[Image.Image, ...] = (), **options) -> bytes:
    file = io.BytesIO()
    # Copies, because saving leaves its settings on an image, which would affect the next save.
    more = {"save_all": True, "append_images": [frame.copy() for frame in frames]} if frames else {}
    image.copy().save(file, kind, **more, **options)
    return file.getvalue()


def bmp(width: int, height: int, body: bytes, bits: int = 24, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    palette = bytes(4 << bits) if bits <= 8 else b""
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body


def tiff(entries: dict[int, tuple[int, int, int]], after: int = 0, body: bytes = bytes(64)) -> bytes:
    """A little-endian TIFF of one directory: tag -> (type, count, value); ``after`` is the next one's offset."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + struct.pack("<I", after) + body


def grey_tiff(width: int, height: int, **more: tuple[int, int, int]) -> dict[int, tuple[int, int, int]]:
    named = {int(tag.removeprefix("t")): entry for tag, entry in more.items()}
    strips = {273: (4, 1, 8), 278: (4, 1, height), 279: (4, 1, width * height)}
    return {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), **strips, **named}


@functools.cache
def photos() -> dict[str, bytes]:
    """A small file of each supported kind."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :40]
    pixels = np.stack([x * 6, y * 10, (x + y) * 4], axis=2) + rng.integers(0, 8, (24, 40, 3))
    picture = Image.fromarray(pixels.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:22 12:00:00"
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    with_alpha = picture.convert("RGBA")
    with_alpha.putalpha(picture.getchannel("R"))
    deep = Image.fromarray((pixels[..., 0] * 257).astype(np.uint16))
    adam7 = [(5, 3), (5, 3), (10, 3), (10, 6), (20, 6), (20, 12), (40, 12)]  # of 40 x 24
    files = {
        "jpeg": encoded(picture, "JPEG"),
        "jpeg progressive": encoded(picture, "JPEG", progressive=True),
        "jpeg cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "jpeg grey": encoded(picture.convert("L"), "JPEG"),
        "jpeg exif": encoded(picture, "JPEG", exif=exif, icc_profile=bytes(500), comment=b"c"),
        "jpeg restarts": encoded(picture, "JPEG", restart_marker_blocks=1),
        "mpo": encoded(picture, "MPO", exif=exif, frames=(turned, turned)),
        "png": encoded(picture, "PNG", exif=exif),
        "png alpha": encoded(with_alpha, "PNG"),
        "png 16": encoded(deep, "PNG"),
        "png palette": encoded(picture.quantize(16), "PNG", transparency=b"\0\x80"),
        "png interlaced": raw_png(40, 24, b"".join(bytes(1 + 3 * w) * h for w, h in adam7), interlace=1),
        "apng": encoded(picture, "PNG", frames=(turned, turned)),
        "webp": encoded(picture, "WEBP", exif=exif),
        "webp lossless": encoded(with_alpha, "WEBP", lossless=True),
        "webp animated": encoded(picture, "WEBP", frames=(turned, turned)),
        "gif": encoded(picture.quantize(16), "GIF", comment=b"a comment"),
        "gif animated": encoded(picture, "GIF", frames=(turned, turned)),
        "tiff": encoded(picture, "TIFF", exif=exif),
        "tiff pages": encoded(picture, "TIFF", frames=(turned, turned)),
        "tiff 16": encoded(deep, "TIFF"),
        **{f"tiff {name}": encoded(picture, "TIFF", compression=f"tiff_{name}") for name in ("lzw", "adobe_deflate")},
        **{f"tiff {name}": encoded(picture, "TIFF", compression=name) for name in ("jpeg", "packbits")},
        "bmp": encoded(picture, "BMP"),
        "bmp palette": encoded(picture.quantize(16), "BMP"),
        "bmp rle": bmp(40, 24, b"\x28\x01\0\0" * 24 + b"\0\x01", bits=8, compression=1),
        "ppm": encoded(picture, "PPM"),
        "pgm 16": b"P5 40 24 65535\n" + bytes(40 * 24 * 2),
        "pbm plain": b"P1 # comment\n8 2\n" + b"0 1 " * 8,
        "ppm plain": b"P3 4 2 255\n" + b"1 20 255 " * 8,
    }
    if features.check("avif"):
        files["avif"] = encoded(picture, "AVIF", exif=exif)
        files["avif animated"] = encoded(picture, "AVIF", frames=(turned, turned))
    if importlib.util.find_spec("pillow_heif"):
        files |= heic(picture, turned, exif)
    return files


def heic(picture: Image.Image, turned: Image.Image, exif: Image.Exif) -> dict[str, bytes]:
    """One photo, several photos, and one in tiles, as iPhones write it."""
    import pillow_heif

    def written(*photos: Image.Image, **options) -> bytes:
        made = pillow_heif.from_pillow(photos[0])
        for photo in photos[1:]:
            made.add_from_pillow(photo)
        file = io.BytesIO()
        made.save(file, **options)
        return file.getvalue()

    files = {"heic": written(picture, exif=exif.tobytes()), "heic several": written(picture, turned, turned)}
    return {**files, "heic alpha": written(picture.convert("RGBA")), "heic tiles": written(picture, tile_size=16)}


@functools.cache
def model() -> bytes:
    """A model with everything that the reader looks at."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=weights)], "branch", [], [])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [2])
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["probability"], then_branch=branch, else_branch=branch)],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 32, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", 16, 32])],
        [weights],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [4])],
    )
    function = helper.make_function("d", "f", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])
    whole = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)], functions=[function])
    spec = ModelSpec(name="toy", height=16, width=32)
    helper.set_model_props(whole, {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: '{"data": "pets"}'})
    return whole.SerializeToString()


# ------------------------------------------------------------------------------------------------------------ mutations


def read_photo(data: bytes, name: str = "") -> None:
    """Read a photo as bytes or, with a name, as a file; at its full size and reduced."""
    source: bytes | Path = data
    if name:
        source = Path(tempfile.gettempdir(), name)
        source.write_bytes(data)
    for at_least in ((8, 12), None):
        photo = read(source, max_pixels=MAX_PIXELS, at_least=at_least)
        height, width = photo.pixels.shape[:2]
        assert photo.pixels.dtype == np.uint8
        assert photo.pixels.shape == (height, width, 3)
        assert 0 < height <= photo.height
        assert 0 < width <= photo.width
        assert photo.height * photo.width <= MAX_PIXELS
    assert (height, width) == (photo.height, photo.width)


def read_model(data: bytes) -> None:
    path = Path(tempfile.gettempdir(), "model.onnx")
    path.write_bytes(data)
    parse(data)
    assert open_artifact(path).size == len(data)


def read_sidecar(data: bytes) -> None:
    path = Path(tempfile.gettempdir(), "model.engine")
    path.write_bytes(b"engine")
    sidecar_of(path).write_bytes(data)
    assert open_artifact(path).format in ("trt", "trt-rtx")


@functools.cache
def sidecar() -> bytes:
    path = Path(tempfile.gettempdir(), "model.engine")
    path.write_bytes(b"engine")
    spec = ModelSpec(name="toy", height=16, width=32)
    return sidecar_text(Artifact(path, "trt", spec, {"a": 1}, {}, "0" * 64, 6, None, {"gpu": "none"})).encode()


READERS: dict[str, tuple[Callable[..., None], type[PetsegError]]] = {
    "photo": (read_photo, InputError),
    "model": (read_model, ModelError),
    "sidecar": (read_sidecar, ModelError),
}

# ------------------------------------------------------------------------------------------------------ malformed files


def cases() -> Iterator[tuple[str, str, Action]]:
    """The name, reader and action of each malformed input; deterministic."""
    for name, data in photos().items():
        for cut, part in truncations(data):
            yield f"{name}, {cut}", "photo", functools.partial(read_photo, part)
        for what, damaged in damages(data, name):
            yield f"{name}, {what}", "photo", functools.partial(read_photo, damaged)
    for name, data in (*bombs(), *foreign()):
        yield name, "photo", functools.partial(read_photo, data)
    for name, (other, data) in zip(photos(), (*list(photos().items())[5:], *list(photos().items())[:5]), strict=True):
        suffix = name.split()[0]
        yield f"{other} as photo.{suffix}", "photo", functools.partial(read_photo, data, f"photo.{suffix}")
    for reader, data in (("model", model()), ("sidecar", sidecar())):
        action = READERS[reader][0]
        for what, damaged in (*truncations(data), *damages(data, reader)):
            yield f"{reader}, {what}", reader, functools.partial(action, damaged)
    for name, data in model_bombs():
        yield name, "model", functools.partial(read_model, data)
    for name, data in sidecar_bombs():
        yield name, "sidecar", functools.partial(read_sidecar, data)


def truncations(data: bytes) -> Iterator[tuple[str, bytes]]:
    size = len(data)
    for keep in (1, 3, 8, 13, 21, 30, size // 4, size // 2, 3 * size // 4, size - 9, size - 2, size - 1):
        yield f"cut to {keep} of {size}", data[:keep]


def damages(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(name)
    for _ in range(6):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        yield f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    for value in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"):
        at = rng.randrange(min(80, len(data) - 4))
        yield f"{value.hex()} at byte {at}", data[:at] + value + data[at + 4 :]
    yield "twice", data + data
    yield "its halves swapped", data[len(data) // 2 :] + data[: len(data) // 2]
    yield "nothing but zeros after byte 40", data[:40] + bytes(len(data) - 40)


def foreign() -> Iterator[tuple[str, bytes]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.jpg", photos()["jpeg"])
    yield "empty", b""
    yield "zeros", bytes(100_000)
    yield "ones", b"\xff" * 100_000
    yield "text", b"not a photo, but text of some length\n" * 100
    yield "zip", archive.getvalue()
    yield "gzip", gzip.compress(photos()["ppm"], mtime=0)
    yield "elf", b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 62, 1) + bytes(1000)
    yield "pdf", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "onnx", model()


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that declare, or decompress to, far more than they should."""
    jpeg, webp = photos()["jpeg"], photos()["webp lossless"]
    frame = jpeg.index(b"\xff\xc0") + 5
    yield "jpeg of 65500 x 65500", jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :]
    yield "jpeg of 2000 x 2000 in a few bytes", jpeg[:frame] + struct.pack(">HH", 2000, 2000) + jpeg[frame + 4 :]
    yield "jpeg of no height", jpeg[:frame] + struct.pack(">HH", 0, 40) + jpeg[frame + 4 :]
    yield from scan_bombs()
    yield "png of 60000 x 60000", raw_png(60_000, 60_000, b"")
    yield "png of 2000 x 2000 in a few bytes", raw_png(2000, 2000, b"")
    yield "png of 2**31 - 1 columns", raw_png(2**31 - 1, 1, b"")
    yield "png of no columns", raw_png(0, 5, b"")
    yield "png of more pixels than its size", raw_png(4, 4, bytes(50_000_000))
    unfolds = zlib.compress(bytes(100_000_000), 9)
    yield "png with a text that unfolds to 100 MB", raw_png(1, 1, bytes(4), chunk(b"zTXt", b"k\0\0" + unfolds))
    text = chunk(b"iTXt", b"k\0\1\0\0\0" + unfolds)
    yield "png with an international text that unfolds to 100 MB", raw_png(1, 1, bytes(4), text)
    yield "png with a profile that unfolds to 100 MB", raw_png(1, 1, bytes(4), chunk(b"iCCP", b"k\0\0" + unfolds))
    many = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9)) * 500
    yield "png with 500 texts of 1 MB", raw_png(1, 1, bytes(4), many)
    yield "png with 100000 empty chunks", raw_png(1, 1, bytes(4), chunk(b"tEXt", b"k\0v") * 100_000)
    yield "png that claims 2**32 - 1 frames", raw_png(1, 1, bytes(4), chunk(b"acTL", struct.pack(">II", 2**32 - 1, 0)))
    for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (-1, 5), (2000, -(2**31))):
        yield f"bmp of {width} x {height}", bmp(width, height, bytes(100))
    yield "bmp whose run lengths go nowhere", bmp(2000, 1900, b"\0\x02\xff\xff" * 1000, bits=8, compression=1)
    screen = struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    yield "gif of 65535 x 65535", b"GIF89a" + screen + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x00;"
    outside = b"," + struct.pack("<HHHHB", 60_000, 60_000, 5000, 5000, 0) + b"\x02\x00;"
    yield "gif whose frame lies outside", b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0, 0, 0) + outside
    one = photos()["gif"]
    yield (
        "gif of 50000 frames",
        one[:-1] + one[one.rindex(b",", 0, 100) : -1] * 100 + b",\0\0\0\0\1\0\1\0\0\2\0" * 50_000,
    )
    yield "gif with comments of 5 MB", one[:13] + b"!\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0" + one[13:]
    size = webp.index(b"VP8L") + 9
    yield "webp of 16384 x 16384", webp[:size] + struct.pack("<I", 0x0FFFFFFF) + webp[size + 4 :]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\0" * 2
    animation = photos()["webp animated"]
    yield "webp with a canvas of 16384 x 16384", animation[:12] + canvas + animation[30:]
    yield "ppm of 60000 x 60000", b"P6 60000 60000 255\n" + bytes(100)
    yield "ppm of 2000 x 2000 in a few bytes", b"P6 2000 2000 255\n" + bytes(100)
    yield "ppm of a long number", b"P6 " + b"9" * 1_000_000 + b" 1 255\n"
    yield "ppm of nothing but comments", b"P3\n" + b"# comment\n" * 200_000
    yield "ppm of white space", b"P3 2000 2000 255\n" + b" " * 5_000_000
    yield from tiff_bombs()


def scan_bombs() -> Iterator[tuple[str, bytes]]:
    """JPEGs with a scan of the whole picture for every ten bytes."""
    for name in ("jpeg", "jpeg progressive"):
        data = encoded(Image.new("RGB", (1900, 1900)), "JPEG", progressive=name != "jpeg")
        first = data.index(b"\xff\xda")
        empty = b"\xff\xda\0\x08\1\1\0" + (b"\0\0\0" if name != "jpeg" else b"\0\x3f\0")
        yield f"{name} of 500000 scans", data[:first] + empty * 500_000 + b"\xff\xd9"
        yield f"{name} of 500000 scans behind the picture", data[:-2] + empty * 500_000 + b"\xff\xd9"


def tiff_bombs() -> Iterator[tuple[str, bytes]]:
    yield "tiff of 60000 x 60000", tiff(grey_tiff(60_000, 60_000))
    yield "tiff of 2000 x 2000 in a few bytes", tiff(grey_tiff(2000, 2000))
    yield "tiff whose directory follows itself", tiff(grey_tiff(4, 4), after=8)
    huge = {f"t{tag}": (4, 2**32 - 1, 8) for tag in (270, 273, 279, 320, 34665)}
    yield "tiff with counts of 2**32 - 1", tiff(grey_tiff(4, 4, **huge))
    yield "tiff with offsets beyond its end", tiff(grey_tiff(4, 4, t273=(4, 1, 2**32 - 1), t270=(2, 100, 2**32 - 1)))
    yield "tiff with a directory of 65535 entries", b"II*\0\x08\0\0\0\xff\xff" + bytes(1000)
    yield "tiff with an EXIF directory that is itself", tiff(grey_tiff(4, 4, t34665=(4, 1, 8)))
    tile = {"t322": (4, 1, 2**30), "t323": (4, 1, 2**30), "t324": (4, 1, 8), "t325": (4, 1, 16)}
    yield "tiff with a tile of 2**30 x 2**30", tiff(grey_tiff(4, 4, **tile))
    for name, code in (("lzw", 5), ("jpeg", 7), ("deflate", 8), ("packbits", 32773)):
        for side in (46_000, 2**30):
            big = {
                "t259": (3, 1, code),
                "t322": (4, 1, side),
                "t323": (4, 1, side),
                "t324": (4, 1, 8),
                "t325": (4, 1, 16),
            }
            yield f"tiff, {name}, with a tile of {side} x {side}", tiff(grey_tiff(4, 4, **big))
        strip = {"t259": (3, 1, code), "t278": (4, 1, 2**32 - 1), "t279": (4, 1, 2**32 - 1)}
        yield f"tiff, {name}, with a strip of 2**32 - 1 rows", tiff(grey_tiff(4, 4, **strip))
    yield "tiff of 255 samples", tiff(grey_tiff(4, 4, t277=(3, 1, 65535)))
    entries = grey_tiff(4, 4)
    page = tiff(entries, body=b"")[8:-4]
    pages = [page + struct.pack("<I", 8 + (len(page) + 4) * number) for number in range(1, 200_000)]
    yield "tiff of 200000 pages", b"II*\0\x08\0\0\0" + b"".join(pages) + page + bytes(4)


def model_bombs() -> Iterator[tuple[str, bytes]]:
    good = model()
    for number in (1, 7, 8, 14):
        yield f"model, field {number} as long as 2**63", good + varint(number << 3 | 2) + varint(2**63)
        yield f"model, field {number} as long as 2**64 - 1", good + varint(number << 3 | 2) + varint(2**64 - 1)
        yield f"model, field {number} as an endless number", good + varint(number << 3) + b"\xff" * 1000
        yield f"model, field {number} as a group", good + varint(number << 3 | 3) * 1000
    yield "model, field 0", b"\0" * 1000
    # Function bodies in attributes: a node, its attribute, a graph, a node...
    for depth in (30, 100, 3000):
        inner = b""
        for _ in range(depth):
            inner = block(1, block(5, block(6, inner)))
        yield f"model, {3 * depth} messages deep", block(7, inner)
    yield "model of 3 million empty fields", good + b"\x70\0" * 3_000_000
    yield "model with 100000 metadata", good + b"".join(block(14, block(1, b"%d" % i)) for i in range(100_000))
    yield "model with metadata of 40 MB", good + block(14, block(1, b"a") + block(2, b"b" * 40_000_000))
    yield "model with the same metadata twice", good + block(14, block(1, SPEC_KEY.encode())) * 2
    yield "model with 20000 inputs", block(7, block(11, b"") * 20_000)
    for what, name in (
        ("lines", "a\n\u2028b"),
        ("1 MB", "a" * 1_000_000),
    ):  # found by the fuzzer: it was copied into the error message
        other = onnx.load_model_from_string(good)
        other.graph.output[0].name = name
        yield f"model whose output has a name of {what}", other.SerializeToString()
        other = onnx.load_model_from_string(good)
        other.graph.output[0].type.tensor_type.shape.dim[0].dim_param = name
        other.graph.output[0].type.tensor_type.shape.dim[1].dim_param = name
        yield f"model whose output has a size of {what}", other.SerializeToString()
    for name, text in hostile_json():
        yield f"model with a specification of {name}", with_spec(text)
        yield f"model with a provenance of {name}", with_spec(sidecar_spec(), text)


def with_spec(spec: bytes, provenance: bytes = b"{}") -> bytes:
    """The model with other metadata."""
    bare = onnx.load_model_from_string(model())
    del bare.metadata_props[:]
    entries = {SPEC_KEY: spec, PROVENANCE_KEY: provenance}
    metadata = (block(14, block(1, key.encode()) + block(2, text)) for key, text in entries.items())
    return bare.SerializeToString() + b"".join(metadata)


def sidecar_spec() -> bytes:
    return json.dumps(json.loads(sidecar())["spec"]).encode()


def spec_with(field: str, text: str) -> bytes:
    """A specification in which this is the JSON text of a field."""
    value = json.loads(sidecar_spec())
    value[field] = "HERE"
    return json.dumps(value).replace('"HERE"', text).encode()


def hostile_json() -> Iterator[tuple[str, bytes]]:
    yield "100000 brackets", b"[" * 100_000
    yield "100000 braces", b'{"a":' * 100_000
    yield "a long number", b'{"schema_version": ' + b"9" * 100_000 + b"}"
    yield "an infinite number", spec_with("height", "1e999")
    yield "not a number", spec_with("threshold", "NaN")
    yield "half a pair", spec_with("name", r'"\ud800"')
    yield "a name of 10 MB", spec_with("height", f'"{"a" * 10_000_000}"')
    yield "a list", b"[]"
    yield "no UTF-8", b"\xff\xfe{}"
    yield "3 million lists", b'{"name": [' + b"[]," * 3_000_000 + b"[]]}"
    # Python's recursion limit counts from the call site: one of these can be read, but not written again.
    for depth in (*range(940, 1000), 5000, 20_000):
        yield f"{depth} lists in a name", spec_with("name", "[" * depth + "]" * depth)


def sidecar_bombs() -> Iterator[tuple[str, bytes]]:
    good = json.loads(sidecar())
    for name, text in hostile_json():
        yield f"sidecar of {name}", text
        yield f"sidecar with a specification of {name}", placed(good, "spec", text)
        yield f"sidecar with a format of {name}", placed(good, "format", text)
    for key in good:
        for value in (None, [], {}, "", -1, 1e308, True, [[]], {"a": {}}):
            yield f"sidecar with {key} = {value!r}", json.dumps({**good, key: value}).encode()
        yield f"sidecar without {key}", json.dumps({other: good[other] for other in good if other != key}).encode()


def placed(good: dict[str, object], key: str, text: bytes) -> bytes:
    return json.dumps({**good, key: "@"}).encode().replace(b'"@"', text)


# ----------------------------------------------------------------------------------------------------------- the fuzzer

INTERESTING = [
    *(struct.pack(order + kind, value) for order in "<>" for kind in "BHI" for value in (0, 1, 0x7F, 0x80, 0xFF)),
    *(struct.pack(order + "H", value) for order in "<>" for value in (0x7FFF, 0x8000, 0xFFFF)),
    *(struct.pack(order + "I", value) for order in "<>" for value in (0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)),
    *(
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xda",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xc4",
        b"\xff\xdb",
        b"\xff\xdd",
        b"\xff\xe1",
    ),
    *(b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"Exif\0\0"),
    *(b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"GIF89a", b"!\xf9\x04", b"!\xff\x0b"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"BM", b"P6", b"P3", b"#", b"ftyp", b"meta", b"iprp", b"ispe", b"av01", b"grid"),
    *(b"\x80" * 10, b"\xff" * 10, b"\x0a", b"\x3a", b"\x72", b"{", b"[", b'"', b"1e999", b"NaN", b"\\ud800", b"null"),
]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the files with one to six mutations."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        rng.choice(CHANGES)(rng, data, seeds)
    return bytes(data[:100_000])


def somewhere(rng: random.Random, data: bytearray) -> tuple[int, int]:
    """A random range, mostly short and near the beginning, where the headers are."""
    begin = rng.randrange(min(len(data), rng.choice((64, 400, len(data) + 1))) + 1)
    return begin, min(len(data), begin + rng.choice((1, 2, 4, 8, 30, 200)))


def flip(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin, end = somewhere(rng, data)
    if begin < end:
        data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin, end = somewhere(rng, data)
    data[begin:end] = rng.randbytes(end - begin)


def set_interesting(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin, value = somewhere(rng, data)[0], rng.choice(INTERESTING)
    data[begin : begin + rng.choice((0, len(value)))] = value


def add_to_number(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    """Change a length, an offset, a size or a count by a little."""
    begin, form = somewhere(rng, data)[0], rng.choice(("<H", ">H", "<I", ">I", "B"))
    size = struct.calcsize(form)
    if begin + size <= len(data):
        (value,) = struct.unpack_from(form, data, begin)
        struct.pack_into(form, data, begin, (value + rng.randint(-40, 40)) % 256**size)


def remove(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin, end = somewhere(rng, data)
    del data[begin:end]


def duplicate(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin, end = somewhere(rng, data)
    data[end:end] = data[begin:end] * rng.choice((1, 1, 2, 50))


def splice(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    other = rng.choice(seeds)
    begin, end = somewhere(rng, bytearray(other))
    at = somewhere(rng, data)[0]
    data[at : at + rng.choice((0, end - begin))] = other[begin:end]


def truncate(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


CHANGES = (flip, flip, overwrite, set_interesting, set_interesting, add_to_number, remove, duplicate, splice, truncate)


def fuzz(runs: int, seed: int) -> Iterator[tuple[str, str, Action]]:
    """Mutated photos, and as many model files. Each is generated from its number, and so can be reproduced."""
    pictures, texts = list(photos().values()), [sidecar()]
    for number in range(runs):
        rng = random.Random(f"{seed} {number}")
        yield f"photo {number} of seed {seed}", "photo", functools.partial(read_photo, mutated(rng, pictures))
        if number % 2:
            yield f"model {number} of seed {seed}", "model", functools.partial(read_model, mutated(rng, [model()]))
        else:
            yield f"sidecar {number} of seed {seed}", "sidecar", functools.partial(read_sidecar, mutated(rng, texts))


# ------------------------------------------------------------------------------------------------ the separate process


def attempt(action: Action, documented: type[PetsegError]) -> str:
    """The outcome of an input; raises any exception that it must not end in."""
    try:
        action()
    except documented as error:
        message = str(error)
        assert "not enough memory" not in message, message
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1000, f"an error of {len(message)} characters: {message[:200]}"
        return type(error).__name__
    return "read"


def run_all(inputs: Iterable[tuple[str, str, Action]]) -> None:
    """Process each input, with a line of JSON before it and one after it."""
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    peak = peak_memory()
    for name, reader, action in inputs:
        tell(begins=name)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            outcome = attempt(action, READERS[reader][1])
        except BaseException:  # noqa: BLE001 (to be told, and the next input tried)
            tell(name=name, outcome="wrong", why=traceback.format_exc()[-3000:])
        else:
            grown, peak = peak_memory() - peak, max(peak, peak_memory())
            tell(name=name, outcome=outcome, reader=reader, grown=grown)
    faulthandler.cancel_dump_traceback_later()


def tell(**values: object) -> None:
    print(json.dumps(values), flush=True)  # noqa: T201


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cases", "fuzz"))
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        photos(), model(), sidecar()
        run_all(cases() if options.what == "cases" else fuzz(options.runs, options.seed))


# ------------------------------------------------------------------------------------------------------------ the tests


def ended(*arguments: str) -> list[dict[str, object]]:
    """The outcomes that the process reported; anything that went wrong is named."""
    command = [sys.executable, "-W", "error", __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"crash or hang in {lines[-1:]}: {done.stderr[-3000:]}"
    results = [line for line in lines if "outcome" in line]
    wrong = [f"{line['name']}: {line['why']}" for line in results if line["outcome"] == "wrong"]
    assert not wrong, "\n".join(wrong[:5])
    return results


def test_malformed_inputs_end_in_a_result_or_a_documented_error() -> None:
    results = ended("cases")
    names = [line["name"] for line in results]
    assert len(names) == len(set(names))
    assert len(names) >= 200
    refused = {str(line["name"]) for line in results if line["outcome"] == "ImageTooLarge"}
    assert refused >= {
        "png of 60000 x 60000",
        "gif whose frame lies outside",
        "tiff, lzw, with a tile of 46000 x 46000",
    }
    outcomes = Counter((line["reader"], line["outcome"]) for line in results)
    for reader, outcome in (("photo", "UnreadableImage"), ("photo", "ImageTooLarge"), ("model", "ModelError")):
        assert outcomes[reader, outcome] >= 10
    assert [line for line in results if int(str(line["grown"])) > MAX_GROWTH] == []


def test_mutated_inputs_end_in_a_result_or_a_documented_error() -> None:
    results = ended("fuzz", "--runs", str(RUNS))
    readers = Counter(line["reader"] for line in results)
    assert readers["photo"] == readers["model"] + readers["sidecar"] == RUNS
    outcomes = Counter((line["reader"], line["outcome"] == "read") for line in results)
    assert all(outcomes[reader, was_read] > RUNS / 100 for reader in READERS for was_read in (True, False))
    assert [line for line in results if int(str(line["grown"])) > MAX_GROWTH] == []


if __name__ == "__main__":
    main()
