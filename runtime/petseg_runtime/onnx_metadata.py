"""Read an ONNX file's metadata, inputs, outputs, opset and identity without the onnx package.

An ONNX file is one protobuf message. The wire format is simple enough to be parsed here (varints, lengths, fixed
words), so that a device needs neither onnx nor protobuf to identify a model.

The bytes are not trusted. Lengths are checked against the end of the enclosing message before they are used, nested
messages are traversed with an explicit stack of bounded depth, each field is visited a fixed number of times, the
number of fields and the amount of text are limited, and the weights are skipped, never copied.

Field numbers are those of ``onnx.proto`` (onnx 1.23, IR version 14); by protobuf's rules they never change.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from petseg_runtime.errors import ModelError

__all__ = ["OnnxFile", "Tensor", "parse", "read", "with_metadata"]

#: Protobuf's limit on the size of a message, and so ONNX's on a file: sizes are signed 32-bit numbers.
MAX_SIZE: Final = 2**31 - 1
MAX_METADATA: Final = 1000
#: Bytes of text read from a file; one such limit for the metadata, another for all names together.
MAX_TEXT: Final = 16 * 2**20
#: Fields visited in one traversal, which takes a few seconds at worst. A segmentation network has thousands, a language
#: model that fits into one file some hundred thousand.
MAX_FIELDS: Final = 2_000_000
#: Nesting of messages. Protobuf itself stops at 100; a subgraph takes three levels (node, attribute, graph).
MAX_DEPTH: Final = 100
MAX_VALUES: Final = 10_000
MAX_RANK: Final = 64

_Buffer: TypeAlias = bytes | mmap.mmap
_Shape: TypeAlias = tuple[int | str | None, ...]

# TensorProto.DataType from 0 on, with the names of numpy and ml_dtypes.
# fmt: off
_DTYPES: Final = (
    "undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16",
    "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "uint4", "int4", "float4_e2m1fn", "float8_e8m0fnu", "uint2", "int2",
    "float6_e2m3fn", "float6_e3m2fn",
)
# fmt: on
# The alternatives in TypeProto's oneof.
_TENSOR_TYPE: Final = 1
_OTHER_TYPES: Final = {4: "sequence", 5: "map", 7: "opaque", 8: "sparse_tensor", 9: "optional"}


@dataclass(frozen=True)
class Tensor:
    """A graph input or output, as declared.

    Attributes:
        name: Its name in the graph.
        dtype: Element type, with numpy's name (``"uint8"``); for anything but a dense tensor its kind
            (``"sequence"``); ``"undefined"`` without a type.
        shape: One entry per axis: a size, the name of a dynamic size, or None for a dynamic size without a name.
            Empty for a scalar, and if the file declares no shape.
    """

    name: str
    dtype: str
    shape: _Shape


@dataclass(frozen=True)
class OnnxFile:
    """The header of an ONNX file.

    Attributes:
        identity: SHA-256, in hex, of the file without its metadata, so that adding a receipt does not change it.
        metadata: ``metadata_props``, not interpreted.
        inputs: The graph's inputs, in order. (Before IR version 4 initializers are listed among them.)
        outputs: The graph's outputs, in order.
        opset: Version of the default operator set; 0 if the model imports none.
        ir_version: Version of the ONNX format.
        size: The file's size in bytes.
    """

    identity: str
    metadata: dict[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    opset: int
    ir_version: int
    size: int


def read(path: str | os.PathLike[str]) -> OnnxFile:
    """Read the header of an ONNX file; the file is memory-mapped, not loaded.

    Raises:
        ModelError: The file is missing, empty, too large, not an ONNX model, damaged, or keeps some of its weights in
            another file.
    """
    name, file = os.fspath(path), Path(path)
    try:
        if not file.is_file():  # opening a pipe would block forever
            raise ModelError(f"{name}: {_why_no_file(file)}")
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            _check_size(size, name)  # before mapping: an empty file cannot be mapped
            with mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as data:
                return parse(data, name)
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror or error})") from error


def parse(data: bytes | mmap.mmap, name: str = "the model") -> OnnxFile:
    """Read the header of an ONNX file from its bytes; see :func:`read`.

    Args:
        data: The complete file.
        name: Its name in error messages.

    Raises:
        ModelError: As for ``read``.
    """
    _check_size(len(data), name)
    metadata = _read_metadata(_Wire(data, name))
    header = _read_header(_Wire(data, name))
    _refuse_external_data(_Wire(data, name))
    return OnnxFile(
        identity=_hash_without_metadata(_Wire(data, name)),
        metadata=metadata,
        inputs=header.inputs,
        outputs=header.outputs,
        opset=header.opset,
        ir_version=header.ir_version,
        size=len(data),
    )


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Replace the metadata of a model; every byte outside ``metadata_props`` stays, and so does the identity.

    Args:
        data: A complete ONNX file.
        metadata: All metadata of the result; written at the end, in the order of the keys.

    Raises:
        ModelError: ``data`` is not an ONNX file, or the result could not be read back: more metadata or a larger file
            than the limits allow, or text that cannot be encoded as UTF-8 (half of a surrogate pair).
    """
    name = "the model"
    _check_size(len(data), name)
    try:
        entries = [_encoded(14, _encoded(1, k.encode()) + _encoded(2, v.encode())) for k, v in sorted(metadata.items())]
    except UnicodeEncodeError as error:
        raise ModelError(f"{name}: metadata that is not valid Unicode ({error.reason})") from error
    view = memoryview(data)
    result = b"".join([*(view[begin:end] for begin, end in _outside_metadata(_Wire(data, name))), *entries])
    _check_size(len(result), name)
    _read_metadata(_Wire(result, name))
    return result


# ---------------------------------------------------------------------------------------------- the wire format


class _Kind(IntEnum):
    """Wire types. Groups (3 and 4) were obsolete before ONNX existed; 6 and 7 are undefined."""

    VARINT = 0
    FIXED64 = 1
    LENGTH = 2
    FIXED32 = 5


class _Field(NamedTuple):
    """One field of a message. Its tag starts at ``begin``; its value is ``number``, or the bytes start:end."""

    id: int
    kind: _Kind
    number: int
    begin: int
    start: int
    end: int


class _Wire:
    """The bytes of a protobuf message, with the remaining limits of one traversal."""

    def __init__(self, data: _Buffer, name: str) -> None:
        self.data = data
        self.name = name
        self.fields_left = MAX_FIELDS
        self.text_left = MAX_TEXT

    def error(self, reason: str) -> ModelError:
        remedy = "use a file made by `petseg export`, or copy it again"
        return ModelError(f"{self.name}: not an ONNX model, or a damaged one ({reason}); {remedy}")

    def fields(self, message: _Field | None = None) -> Iterator[_Field]:
        """Iterate over the fields of a message (None: of the file), each checked to lie inside it."""
        position, end = (0, len(self.data)) if message is None else (message.start, message.end)
        if message is not None:
            self.expect(message, _Kind.LENGTH)
        while position < end:
            field = self._field(position, end)
            yield field
            position = field.end

    def _field(self, begin: int, limit: int) -> _Field:
        self.fields_left -= 1
        if self.fields_left < 0:
            raise self.error(f"more than {MAX_FIELDS} fields")
        tag, start = self._varint(begin, limit)
        identifier, kind = tag >> 3, tag & 7
        if identifier == 0 or tag >= 2**32:
            raise self.error(f"no valid field at byte {begin}")
        if kind == _Kind.VARINT:
            number, end = self._varint(start, limit)
            return _Field(identifier, _Kind.VARINT, number, begin, start, end)
        if kind == _Kind.LENGTH:
            length, start = self._varint(start, limit)
        elif kind in (_Kind.FIXED32, _Kind.FIXED64):
            length = 4 if kind == _Kind.FIXED32 else 8
        else:
            raise self.error(f"field {identifier} at byte {begin} has the wire type {kind}")
        if length > limit - start:
            raise self.error(
                f"field {identifier} at byte {begin} has {length} bytes where {limit - start} are left (truncated?)"
            )
        return _Field(identifier, _Kind(kind), 0, begin, start, start + length)

    def _varint(self, position: int, limit: int) -> tuple[int, int]:
        """Decode an unsigned 64-bit number, seven bits per byte, low bits first; returns it and its end position."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= limit:
                raise self.error(f"it ends inside a number, at byte {limit} (truncated?)")
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value, position
        raise self.error(f"a number of more than 64 bits before byte {position}")

    def expect(self, field: _Field, kind: _Kind) -> None:
        if field.kind != kind:
            raise self.error(f"field {field.id} at byte {field.begin} is stored as {field.kind.name}, not {kind.name}")

    def int64(self, field: _Field) -> int:
        self.expect(field, _Kind.VARINT)
        return field.number - 2**64 if field.number >= 2**63 else field.number

    def int32(self, field: _Field) -> int:
        """Decode an int32 or an enum. As in every protobuf parser, the upper 32 bits are dropped."""
        self.expect(field, _Kind.VARINT)
        low = field.number & 0xFFFFFFFF
        return low - 2**32 if low >= 2**31 else low

    def text(self, field: _Field) -> str:
        self.expect(field, _Kind.LENGTH)
        self.text_left -= field.end - field.start
        if self.text_left < 0:
            raise self.error(f"more than {MAX_TEXT >> 20} MiB of text")
        try:
            return self.data[field.start : field.end].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"the text at byte {field.start} is not UTF-8") from error


def _encoded(identifier: int, payload: bytes) -> bytes:
    """Encode a length-delimited field."""
    return _encoded_varint(identifier << 3 | _Kind.LENGTH) + _encoded_varint(len(payload)) + payload


def _encoded_varint(value: int) -> bytes:
    low_first = bytearray()
    while value >= 0x80:
        low_first.append(value & 0x7F | 0x80)
        value >>= 7
    low_first.append(value)
    return bytes(low_first)


# -------------------------------------------------------------------------------------------- the ONNX messages


@dataclass
class _Header:
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    opset: int = 0
    ir_version: int = 0


def _read_metadata(wire: _Wire) -> dict[str, str]:
    """ModelProto.metadata_props = 14, of StringStringEntryProto: key = 1, value = 2."""
    metadata: dict[str, str] = {}
    for field in wire.fields():
        if field.id != 14:
            continue
        key = value = ""
        for part in wire.fields(field):
            if part.id == 1:
                key = wire.text(part)
            elif part.id == 2:
                value = wire.text(part)
        if key in metadata:
            raise wire.error(f"the metadata have {key[:100]!r} twice")
        if len(metadata) == MAX_METADATA:
            raise wire.error(f"more than {MAX_METADATA} metadata entries")
        metadata[key] = value
    return metadata


def _read_header(wire: _Wire) -> _Header:
    """ModelProto: ir_version = 1, graph = 7, opset_import = 8."""
    header, graph = _Header(), None
    for field in wire.fields():
        match field.id:
            case 1:
                header.ir_version = wire.int64(field)
            case 7:
                # Protobuf would merge two graphs into one. No exporter writes two, and engines may differ on them.
                graph = _only(wire, field, graph)
            case 8:
                domain, version = _read_opset(wire, field)
                header.opset = version if domain in ("", "ai.onnx") else header.opset
    if graph is None:
        raise wire.error("it has no graph")
    header.inputs = _read_values(wire, graph, 11)
    header.outputs = _read_values(wire, graph, 12)
    return header


def _read_values(wire: _Wire, graph: _Field, which: int) -> tuple[Tensor, ...]:
    """GraphProto: input = 11, output = 12."""
    values: list[Tensor] = []
    for field in wire.fields(graph):
        if field.id == which:
            if len(values) == MAX_VALUES:
                raise wire.error(f"more than {MAX_VALUES} inputs or outputs")
            values.append(_read_value(wire, field))
    return tuple(values)


def _read_opset(wire: _Wire, opset: _Field) -> tuple[str, int]:
    """OperatorSetIdProto: domain = 1, version = 2."""
    domain, version = "", 0
    for field in wire.fields(opset):
        if field.id == 1:
            domain = wire.text(field)
        elif field.id == 2:
            version = wire.int64(field)
    return domain, version


def _read_value(wire: _Wire, value: _Field) -> Tensor:
    """ValueInfoProto: name = 1, type = 2 (a TypeProto)."""
    name, of = "", None
    for field in wire.fields(value):
        if field.id == 1:
            name = wire.text(field)
        elif field.id == 2:
            of = _only(wire, field, of)
    dtype, tensor = "undefined", None
    for field in wire.fields(of) if of else ():
        if field.id == _TENSOR_TYPE:
            tensor = _only(wire, field, tensor)
            dtype = "undefined"
        elif field.id in _OTHER_TYPES:
            tensor, dtype = None, _OTHER_TYPES[field.id]
    if tensor is None:
        return Tensor(name, dtype, ())
    return Tensor(name, *_read_tensor_type(wire, tensor))


def _read_tensor_type(wire: _Wire, tensor: _Field) -> tuple[str, _Shape]:
    """TypeProto.Tensor: elem_type = 1, shape = 2; TensorShapeProto: dim = 1."""
    code, shape = 0, None
    for field in wire.fields(tensor):
        if field.id == 1:
            code = wire.int32(field)
        elif field.id == 2:
            shape = _only(wire, field, shape)
    sizes: list[int | str | None] = []
    for field in wire.fields(shape) if shape else ():
        if field.id == 1:
            sizes.append(_read_size(wire, field))
            if len(sizes) > MAX_RANK:
                raise wire.error(f"a tensor of more than {MAX_RANK} axes")
    return _DTYPES[code] if 0 <= code < len(_DTYPES) else f"type {code}", tuple(sizes)


def _read_size(wire: _Wire, dimension: _Field) -> int | str | None:
    """TensorShapeProto.Dimension: dim_value = 1 or dim_param = 2, whichever comes last."""
    size: int | str | None = None
    for field in wire.fields(dimension):
        if field.id == 1:
            size = wire.int64(field)
            size = None if size < 0 else size  # some exporters write -1 for a dynamic dimension
        elif field.id == 2:
            size = wire.text(field) or None
    return size


def _only(wire: _Wire, field: _Field, before: _Field | None) -> _Field:
    if before is not None:
        raise wire.error(f"field {field.id} at byte {field.begin} is there a second time")
    wire.expect(field, _Kind.LENGTH)
    return field


# Where a message may contain tensors: for each kind of message, the fields whose messages may contain one.
_LEADS_TO: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},  # graph, training_info, functions
    "TrainingInfo": {1: "Graph", 2: "Graph"},  # initialization, algorithm
    "Function": {7: "Node", 11: "Attribute"},  # node, attribute_proto
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},  # node, initializer, sparse_initializer
    "Node": {5: "Attribute"},
    # t, g, tensors, graphs (of If, Loop, Scan), sparse_tensor, sparse_tensors
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},  # values, indices
    "Tensor": {},
}


def _refuse_external_data(wire: _Wire) -> None:
    """Visit every tensor, depth first; only the path to the current one is held in memory."""
    path = [("Model", wire.fields())]
    while path:
        kind, fields = path[-1]
        field = next(fields, None)
        if field is None:
            path.pop()
            continue
        if kind == "Tensor":
            _refuse_external_tensor(wire, field)
        below = _LEADS_TO[kind].get(field.id)
        if below:
            if len(path) == MAX_DEPTH:
                raise wire.error(f"messages nested more than {MAX_DEPTH} deep")
            path.append((below, wire.fields(field)))


def _refuse_external_tensor(wire: _Wire, field: _Field) -> None:
    """TensorProto: external_data = 13, data_location = 14 (EXTERNAL = 1)."""
    if field.id == 13:
        wire.expect(field, _Kind.LENGTH)
    elif field.id != 14 or wire.int32(field) != 1:
        return
    raise ModelError(
        f"{wire.name}: keeps weights in another file (ONNX external data); petseg supports single-file models only: "
        "save it as one file with onnx.save(onnx.load(path), path, save_as_external_data=False)"
    )


def _outside_metadata(wire: _Wire) -> Iterator[tuple[int, int]]:
    """The byte ranges of the file outside of ModelProto.metadata_props = 14."""
    begin = 0
    for field in wire.fields():
        if field.id == 14:
            wire.expect(field, _Kind.LENGTH)
            if field.begin > begin:
                yield begin, field.begin
            begin = field.end
    if begin < len(wire.data):
        yield begin, len(wire.data)


def _hash_without_metadata(wire: _Wire) -> str:
    digest = hashlib.sha256()
    # Each view is released immediately: a memory-mapped file cannot be closed while a view exists, not even while an
    # error propagates.
    with memoryview(wire.data) as whole:
        for begin, end in _outside_metadata(wire):
            with whole[begin:end] as part:
                digest.update(part)
    return digest.hexdigest()


def _check_size(size: int, name: str) -> None:
    if size == 0:
        raise ModelError(f"{name}: empty (0 bytes)")
    if size > MAX_SIZE:
        raise ModelError(f"{name}: {size / 2**30:.1f} GiB; an ONNX file must have less than 2 GiB")


def _why_no_file(file: Path) -> str:
    if file.is_dir():
        return "a folder, not a model file"
    return "not a regular file" if file.exists() else "no such file"
