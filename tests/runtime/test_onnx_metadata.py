"""The ONNX reader compared with onnx itself, and with malicious input."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import petseg_runtime
from petseg_runtime import onnx_metadata
from petseg_runtime.errors import ModelError
from petseg_runtime.onnx_metadata import OnnxFile, Tensor, parse, read, with_metadata
from raw_files import block, varint

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))
EDGE = Path(petseg_runtime.__file__).parent / "models" / "edge.onnx"


# ----------------------------------------------------------------------------------------------- building models


def weights(name: str = "w", values: int = 4) -> TensorProto:
    return numpy_helper.from_array(np.arange(values, dtype=np.float32), name)


def external(name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def small_graph(*nodes: onnx.NodeProto, **more) -> onnx.GraphProto:
    return helper.make_graph(
        nodes or [helper.make_node("Relu", ["image"], ["probability"])],
        "small",
        more.pop("inputs", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 32, 3])]),
        more.pop("outputs", [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["N", None, 32])]),
        **more,
    )


def small_model(graph: onnx.GraphProto | None = None, **more) -> onnx.ModelProto:
    return helper.make_model(
        graph or small_graph(initializer=[weights()]),
        producer_name="pytorch",
        producer_version="2.6",
        opset_imports=[helper.make_opsetid("com.example", 3), helper.make_opsetid("", 20)],
        ir_version=10,
        **more,
    )


@functools.cache
def small_bytes() -> bytes:
    """A model with everything that the reader looks at: metadata, a subgraph, a function, a sparse tensor."""
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=weights("c"))], "branch", [], [])
    sparse = helper.make_sparse_tensor(weights("s", 1), helper.make_tensor("i", TensorProto.INT64, [1], [2]), [4])
    model = small_model(
        small_graph(
            helper.make_node("If", ["cond"], ["probability"], then_branch=branch, else_branch=branch),
            initializer=[weights()],
            sparse_initializer=[sparse],
        ),
        functions=[helper.make_function("d", "f", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])],
    )
    helper.set_model_props(model, {"petseg.spec": '{"name": "größe"}', "empty": ""})
    return model.SerializeToString()


GRAPH = block(7, b"")  # the smallest valid model


def refused(data: bytes, match: str = "file") -> str:
    with pytest.raises(ModelError, match=match) as caught:
        parse(data, "file.onnx")
    assert "file.onnx" in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ the onnx oracle


def expected_values(infos) -> list[tuple[str, int, tuple[int | str | None, ...]]]:
    values = []
    for info in infos:
        dims = info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ()
        shape = tuple(
            (d.dim_value if d.dim_value >= 0 else None) if d.HasField("dim_value") else (d.dim_param or None)
            for d in dims
        )
        values.append((info.name, info.type.tensor_type.elem_type, shape))
    return values


def dtype_name(code: int) -> str:
    if code in (TensorProto.UNDEFINED, TensorProto.STRING):
        return TensorProto.DataType.Name(code).lower()
    if code not in TensorProto.DataType.values():
        return f"type {code}"
    return str(onnx_ir.DataType(code).numpy())  # onnx 1.17 returns a wider type for those that numpy lacks


def assert_agrees(ours: OnnxFile, theirs: onnx.ModelProto) -> None:
    assert ours.metadata == {prop.key: prop.value for prop in theirs.metadata_props}
    for mine, infos in ((ours.inputs, theirs.graph.input), (ours.outputs, theirs.graph.output)):
        expected = expected_values(infos)
        assert [(value.name, value.shape) for value in mine] == [(name, shape) for name, _, shape in expected]
        assert [v.dtype for v, i in zip(mine, infos, strict=True) if i.type.HasField("tensor_type")] == [
            dtype_name(code) for (_, code, _), i in zip(expected, infos, strict=True) if i.type.HasField("tensor_type")
        ]
    defaults = [opset.version for opset in theirs.opset_import if opset.domain in ("", "ai.onnx")]
    assert ours.opset == (defaults[-1] if defaults else 0)
    assert ours.ir_version == theirs.ir_version


def tensors_in(message: Message) -> Iterator[TensorProto]:
    """Every TensorProto, found by protobuf's reflection instead of a table of fields."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for below in value if field.is_repeated else [value]:
            if isinstance(below, TensorProto):
                yield below
            yield from tensors_in(below)


def is_external(model: onnx.ModelProto) -> bool:
    return any(t.data_location == TensorProto.EXTERNAL or t.external_data for t in tensors_in(model))


def onnx_reads(data: bytes) -> onnx.ModelProto | None:
    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError:
        return None


#: What we reject and protobuf accepts: groups, fields of the wrong wire type, text that is not UTF-8, and repeats.
STRICTER = re.compile("wire type|stored as|not UTF-8|second time|twice|no graph|no valid field|another file")


def check_against_onnx(data: bytes) -> None:
    theirs = onnx_reads(data)
    try:
        ours = parse(data)
    except ModelError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert theirs is None or STRICTER.search(reason) or not theirs.HasField("graph"), reason
    elif theirs is not None:
        assert not is_external(theirs)
        assert_agrees(ours, theirs)


# --------------------------------------------------------------------------------------- agreement on valid files


@pytest.mark.parametrize("path", [*LIGHT, EDGE], ids=lambda path: path.stem)
def test_real_models_are_read_as_by_onnx(path: Path) -> None:
    model = onnx.load(path)
    ours = read(path)
    assert_agrees(ours, model)
    assert ours.size == path.stat().st_size
    assert ours.inputs
    assert ours.outputs


def test_a_small_model_is_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(small_bytes())
    ours = read(path)
    assert ours.metadata == {"petseg.spec": '{"name": "größe"}', "empty": ""}
    assert ours.inputs == (Tensor("image", "uint8", ("N", 16, 32, 3)),)
    assert ours.outputs == (Tensor("probability", "float32", ("N", None, 32)),)
    assert (ours.opset, ours.ir_version, ours.size) == (20, 10, len(small_bytes()))
    assert ours == parse(small_bytes())
    assert ours == read(str(path))


@pytest.mark.parametrize("code", TensorProto.DataType.values())
def test_every_element_type_has_its_numpy_name(code: int) -> None:
    info = helper.make_tensor_value_info("x", code, [2])
    assert parse(small_model(small_graph(inputs=[info])).SerializeToString()).inputs[0].dtype == dtype_name(code)


def test_an_unknown_element_type_is_named_by_its_number() -> None:
    info = helper.make_tensor_value_info("x", 99, [2])
    assert parse(small_model(small_graph(inputs=[info])).SerializeToString()).inputs[0].dtype == "type 99"


def test_values_that_are_not_tensors_are_described_by_their_kind() -> None:
    float_type = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    types = {
        "sequence": helper.make_sequence_type_proto(float_type),
        "optional": helper.make_optional_type_proto(float_type),
        "map": helper.make_map_type_proto(TensorProto.INT64, float_type),
        "sparse_tensor": helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [1]),
    }
    infos = [helper.make_value_info(kind, of) for kind, of in types.items()] + [onnx.ValueInfoProto(name="bare")]
    inputs = parse(small_model(small_graph(inputs=infos)).SerializeToString()).inputs
    assert inputs == (*(Tensor(kind, kind, ()) for kind in types), Tensor("bare", "undefined", ()))


def test_models_without_inputs_outputs_or_opset_are_read() -> None:
    ours = parse(onnx.ModelProto(graph=onnx.GraphProto(name="g")).SerializeToString())
    assert (ours.inputs, ours.outputs, ours.metadata) == ((), (), {})
    assert (ours.opset, ours.ir_version) == (0, 0)


@pytest.mark.parametrize("shape", [None, [], [0], [-1, 3], ["", "N"], [None]])
def test_unusual_shapes_agree_with_onnx(shape) -> None:
    model = small_model(small_graph(inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]))
    assert_agrees(parse(model.SerializeToString()), model)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
dimensions = st.one_of(st.none(), names, st.integers(0, 2**63 - 1))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(names, st.sampled_from([1, 2, 7, 16]), st.lists(dimensions, max_size=5)), max_size=4),
    st.dictionaries(names, names, max_size=4),
    st.lists(st.tuples(st.sampled_from(["", "ai.onnx", "x"]), st.integers(-(2**63), 2**63 - 1)), max_size=3),
)
def test_generated_models_are_read_as_by_onnx(values, metadata, opsets) -> None:
    model = small_model(small_graph(inputs=[helper.make_tensor_value_info(*value) for value in values]))
    del model.opset_import[:]
    for domain, version in opsets:
        model.opset_import.add(domain=domain, version=version)
    helper.set_model_props(model, metadata)
    assert_agrees(parse(model.SerializeToString()), model)


# ------------------------------------------------------------------------------------------ metadata and identity


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]))))
def test_written_metadata_are_read_back_here_and_by_onnx(metadata: dict[str, str]) -> None:
    data = with_metadata(small_bytes(), metadata)
    theirs = onnx.load_from_string(data)
    assert parse(data).metadata == metadata
    assert {prop.key: prop.value for prop in theirs.metadata_props} == metadata
    assert [prop.key for prop in theirs.metadata_props] == sorted(metadata)
    assert parse(data).identity == parse(small_bytes()).identity


def test_metadata_are_replaced_and_nothing_else_changes() -> None:
    bare = with_metadata(small_bytes(), {})
    theirs = onnx.load_from_string(small_bytes())
    theirs.ClearField("metadata_props")
    assert bare == theirs.SerializeToString()
    entry = block(14, block(1, b"a") + block(2, "ü".encode()))
    assert with_metadata(small_bytes(), {"a": "ü"}) == bare + entry
    assert with_metadata(with_metadata(small_bytes(), {"x": "y"}), {"a": "ü"}) == bare + entry


@pytest.mark.parametrize("length", [127, 128, 129, 16383, 16384])
def test_metadata_at_the_limits_of_a_lengths_bytes_are_read_back(length: int) -> None:
    metadata = {"a" * length: "b" * length}
    data = with_metadata(small_bytes(), metadata)
    assert parse(data).metadata == metadata
    assert {prop.key: prop.value for prop in onnx.load_from_string(data).metadata_props} == metadata


def test_metadata_between_other_fields_are_found_and_replaced() -> None:
    pieces = [block(14, block(1, b"a")), varint(8) + b"\x0a", block(14, block(1, b"b")), GRAPH, block(14, b"")]
    data = b"".join(pieces)
    assert parse(data).metadata == {"a": "", "b": "", "": ""}
    assert with_metadata(data, {}) == pieces[1] + pieces[3]


def test_identity_is_the_hash_of_the_file_without_metadata() -> None:
    assert parse(small_bytes()).identity == hashlib.sha256(with_metadata(small_bytes(), {})).hexdigest()


def test_identity_changes_with_any_byte_outside_the_metadata() -> None:
    data = with_metadata(small_bytes(), {})
    identity = parse(data).identity
    changed = 0
    for position in range(len(data)):
        other = bytearray(data)
        other[position] ^= 1
        try:
            ours = parse(bytes(other))
        except ModelError:
            continue
        if not ours.metadata:  # one flip can turn a field into metadata
            assert ours.identity != identity, position
            changed += 1
    assert changed > len(data) / 2


def test_identity_depends_on_the_order_of_the_fields() -> None:
    version = varint(8) + b"\x0a"
    assert parse(GRAPH + version).identity != parse(version + GRAPH).identity


@pytest.mark.parametrize(
    "metadata",
    [{"\ud800": ""}, {"a": "\udfff"}, {f"k{i}": "" for i in range(1001)}, {"a": "x" * (16 * 2**20)}],
    ids=["surrogate key", "surrogate value", "too many", "too long"],
)
def test_metadata_that_could_not_be_read_back_are_rejected(metadata: dict[str, str]) -> None:
    with pytest.raises(ModelError):
        with_metadata(small_bytes(), metadata)


@pytest.mark.parametrize("data", [b"", b"hello", small_bytes()[:50], block(6, b"") + b"\x73"])
def test_metadata_are_not_added_to_a_file_that_is_not_a_model(data: bytes) -> None:
    with pytest.raises(ModelError):
        with_metadata(data, {"a": "b"})


def test_metadata_up_to_the_limit_are_written_and_read() -> None:
    metadata = {f"k{i}": "v" for i in range(1000)}
    assert parse(with_metadata(small_bytes(), metadata)).metadata == metadata


def test_metadata_beyond_the_limit_are_rejected() -> None:
    refused(GRAPH + b"".join(block(14, block(1, b"%d" % i)) for i in range(1001)), "more than 1000")
    refused(GRAPH + block(14, block(2, b"x" * (16 * 2**20 + 1))), "more than 16 MiB")
    assert len(parse(GRAPH + block(14, block(2, b"x" * (16 * 2**20)))).metadata[""]) == 16 * 2**20


def test_a_duplicate_key_is_rejected() -> None:
    entry = block(14, block(1, b"petseg.spec"))
    refused(GRAPH + entry + entry, "'petseg.spec' twice")


# -------------------------------------------------------------------------------------------------- external data


def in_branch(tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [], [])


def node_with(name: str, value) -> onnx.NodeProto:
    return helper.make_node("Op", [], ["y"], **{name: value})


def sparse(values: TensorProto, indices: TensorProto | None = None) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices or weights("i"), dims=[9])


def function(*nodes: onnx.NodeProto, attributes=()) -> onnx.FunctionProto:
    return onnx.FunctionProto(name="f", domain="d", node=nodes, attribute_proto=attributes)


def nested(tensor: TensorProto, levels: int) -> onnx.GraphProto:
    graph = in_branch(tensor)
    for _ in range(levels):
        graph = helper.make_graph([node_with("body", graph)], "outer", [], [])
    return graph


def training(**graphs: onnx.GraphProto) -> onnx.ModelProto:
    model = small_model()
    model.training_info.add(**graphs)
    return model


PLACES = {
    "initializer": lambda t: small_model(small_graph(initializer=[weights("a"), t])),
    "initializer of a branch": lambda t: small_model(
        small_graph(node_with("g", helper.make_graph([], "g", [], [], initializer=[t])))
    ),
    "sparse values": lambda t: small_model(small_graph(sparse_initializer=[sparse(t)])),
    "sparse indices": lambda t: small_model(small_graph(sparse_initializer=[sparse(weights(), t)])),
    "constant": lambda t: small_model(small_graph(helper.make_node("Constant", [], ["c"], value=t))),
    "list of tensors": lambda t: small_model(small_graph(node_with("tensors", [weights(), t]))),
    "sparse constant": lambda t: small_model(
        small_graph(helper.make_node("Constant", [], ["c"], sparse_value=sparse(t)))
    ),
    "list of sparse tensors": lambda t: small_model(small_graph(node_with("sparses", [sparse(t)]))),
    "If": lambda t: small_model(
        small_graph(helper.make_node("If", ["c"], ["y"], then_branch=in_branch(weights()), else_branch=in_branch(t)))
    ),
    "Loop": lambda t: small_model(small_graph(helper.make_node("Loop", ["m"], ["y"], body=in_branch(t)))),
    "Scan": lambda t: small_model(
        small_graph(helper.make_node("Scan", ["m"], ["y"], body=in_branch(t), num_scan_inputs=1))
    ),
    "list of graphs": lambda t: small_model(small_graph(node_with("graphs", [in_branch(weights()), in_branch(t)]))),
    "nine graphs deep": lambda t: small_model(nested(t, 9)),
    "function": lambda t: small_model(functions=[function(helper.make_node("Constant", [], ["c"], value=t))]),
    "branch in a function": lambda t: small_model(functions=[function(node_with("g", in_branch(t)))]),
    "default of a function's attribute": lambda t: small_model(
        functions=[function(attributes=[helper.make_attribute("a", t)])]
    ),
    "training initialization": lambda t: training(initialization=in_branch(t)),
    "training algorithm": lambda t: training(algorithm=in_branch(t)),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_are_rejected_anywhere(place: str) -> None:
    located = external()
    located.ClearField("external_data")
    listed = external()
    listed.ClearField("data_location")
    for tensor in (external(), located, listed):
        message = refused(PLACES[place](tensor).SerializeToString(), "another file")
        assert "single-file models only" in message
        assert "onnx.save(" in message
    parse(PLACES[place](weights()).SerializeToString())  # so the tensor was rejected, not its position


def test_a_model_saved_with_external_data_is_rejected_and_the_remedy_works(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = small_model(small_graph(initializer=[weights(values=1000)]))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin")
    with pytest.raises(ModelError, match="another file"):
        read(path)
    onnx.save(onnx.load(path), path, save_as_external_data=False)
    assert_agrees(read(path), model)


@pytest.mark.parametrize("number", [2**32 + 1, 2**33 + 1, 2**63 + 1])
def test_a_location_with_high_bits_in_its_field_number_is_found(number: int) -> None:
    data = block(7, block(5, varint(14 << 3) + varint(number)))
    theirs = onnx_reads(data)
    assert theirs is not None
    assert is_external(theirs)  # protobuf reads 1
    refused(data, "another file")


# --------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"\x00" * 64, "no valid field"),
        (b"hello, this is not a model", "not an ONNX model"),
        (b"PK\x03\x04" + bytes(60), "not an ONNX model"),
        (b"\x80\x02}q\x00" + bytes(60), "not an ONNX model"),
        (block(2, b"pytorch"), "no graph"),
        (block(7, b"") + block(7, b""), "second time"),
        (varint(7 << 3) + b"\x01", "field 7 .* VARINT, not LENGTH"),
        (GRAPH + block(1, b"x"), "field 1 .* LENGTH, not VARINT"),
        (GRAPH + varint(8 << 3) + b"\x01", "field 8 "),
        (GRAPH + varint(14 << 3) + b"\x01", "field 14 "),
        (GRAPH + varint(25 << 3) + b"\x01", "field 25 "),
        (GRAPH + varint(14 << 3 | 5) + b"\x01\x02\x03\x04", "FIXED32"),
        (GRAPH + block(14, varint(1 << 3) + b"\x01"), "field 1 "),
        (GRAPH + block(8, block(2, b"")), "field 2 "),
        (block(7, varint(11 << 3) + b"\x01"), "field 11 "),
        (block(7, block(5, block(14, b"\x01"))), "field 14 "),
        (block(7, block(5, varint(13 << 3) + b"\x01")), "field 13 "),
        (block(7, block(11, block(2, block(1, varint(1 << 3 | 1) + bytes(8))))), "FIXED64"),
        (block(7, block(11, block(2, block(1, b"")) * 2)), "second time"),
        (GRAPH + block(14, block(1, b"\xff")), "not UTF-8"),
        (GRAPH + block(14, block(2, b"\xed\xa0\x80")), "not UTF-8"),
        (block(7, block(12, block(1, b"\x80"))), "not UTF-8"),
        (GRAPH + b"\x0b\x0c", "wire type 3"),
        (GRAPH + b"\x0e", "wire type 6"),
        (GRAPH + b"\x0f", "wire type 7"),
        (GRAPH + b"\x08" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (GRAPH + b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (GRAPH + b"\x08" + b"\xff" * 4, "inside a number"),
        (GRAPH + b"\x82\x80\x80\x80\x10\x00", "no valid field"),
        (GRAPH + b"\x3a", "inside a number"),
        (GRAPH + b"\x12\x05pyto", "has 5 bytes where 4 are left"),
        (GRAPH + b"\x0d\x01\x02", "has 4 bytes"),
        (GRAPH + b"\x09" + bytes(7), "has 8 bytes"),
        (block(7, b"\x5a\x05" + b"\x0a\x01x") + block(2, b"more"), "has 5 bytes where 3 are left"),
        (block(7, block(11, block(2, block(1, block(2, block(1, b"") * 65))))), "more than 64 axes"),
    ],
)
def test_damage_is_rejected_with_its_reason(data: bytes, match: str) -> None:
    refused(data, match)


def test_the_largest_numbers_are_read_as_by_protobuf() -> None:
    for value in (2**63 - 1, 2**63, 2**64 - 1):
        data = GRAPH + varint(8) + varint(value)
        theirs = onnx_reads(data)
        assert theirs is not None
        assert parse(data).ir_version == theirs.ir_version
    assert parse(GRAPH + varint(8) + varint(2**64 - 1)).ir_version == -1


def test_unknown_fields_are_skipped() -> None:
    unknown = varint(1000 << 3) + b"\x01" + block(1001, b"abc") + varint(1002 << 3 | 5) + bytes(4)
    assert parse(unknown + small_bytes() + unknown).metadata == parse(small_bytes()).metadata


def test_the_last_alternative_of_a_oneof_wins() -> None:
    dimension = block(2, b"N") + varint(1 << 3) + b"\x05"
    tensor, sequence = block(1, varint(8) + b"\x02" + block(2, block(1, dimension))), block(4, b"")
    for of in (tensor + sequence, sequence + tensor):
        data = block(7, block(11, block(2, of)))
        theirs = onnx_reads(data)
        assert theirs is not None
        is_tensor = theirs.graph.input[0].type.WhichOneof("value") == "tensor_type"
        expected = Tensor("", "uint8", (5,)) if is_tensor else Tensor("", "sequence", ())
        assert parse(data).inputs == (expected,)


def test_truncation_at_any_length_is_rejected_unless_onnx_accepts_it() -> None:
    data = small_bytes()
    readable = 0
    for length in range(len(data)):
        theirs = onnx_reads(data[:length])
        if theirs is not None and theirs.HasField("graph"):
            assert_agrees(parse(data[:length]), theirs)
            readable += 1
        else:
            refused(data[:length])
    assert 0 < readable < 10


def test_every_flipped_bit_is_rejected_or_read_as_by_onnx() -> None:
    data = small_bytes()
    for position in range(len(data)):
        for bit in range(8):
            other = bytearray(data)
            other[position] ^= 1 << bit
            check_against_onnx(bytes(other))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_rejected_or_read_as_by_onnx(data: bytes) -> None:
    if data:
        check_against_onnx(data)


wire_bytes = st.recursive(
    st.one_of(
        st.binary(max_size=8),
        st.builds(lambda n, v: varint(n << 3) + varint(v), st.integers(1, 26), st.integers(0, 2**64 - 1)),
    ),
    lambda inner: st.lists(st.builds(block, st.integers(1, 26), inner), max_size=4).map(b"".join),
    max_leaves=20,
)


@settings(deadline=None, max_examples=400)
@given(wire_bytes)
def test_well_formed_nonsense_is_rejected_or_read_as_by_onnx(data: bytes) -> None:
    if data:
        check_against_onnx(data)
        check_against_onnx(data + GRAPH)
        check_against_onnx(block(7, data))


# --------------------------------------------------------------------------------------------------- hostile files


def peak_while_refusing(data: bytes, match: str) -> int:
    tracemalloc.start()
    try:
        refused(data, match)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_length_beyond_its_message_allocates_nothing() -> None:
    for length in (2**31 - 1, 2**40, 2**63, 2**64 - 1):
        for inside in (
            varint(7 << 3 | 2) + varint(length),
            GRAPH + varint(14 << 3 | 2) + varint(length),
            GRAPH + block(14, varint(1 << 3 | 2) + varint(length)),
            block(7, block(5, varint(9 << 3 | 2) + varint(length))),
        ):
            assert peak_while_refusing(inside, "wants|left") < 100_000


def test_a_length_may_not_extend_beyond_its_message() -> None:
    inner = b"\x0a\x7f"  # a key of 127 bytes, which fit into the file but not into the entry
    refused(GRAPH + block(14, inner) + block(2, b"x" * 200), "has 127 bytes where 0 are left")


def deep(levels: int) -> bytes:
    """Graphs in attributes in nodes in graphs."""
    data = b""
    for _ in range(levels):
        data = block(1, block(5, block(6, data)))
    return block(7, data)


def test_graphs_are_read_up_to_onnxs_nesting_depth() -> None:
    assert parse(deep(32)).inputs == ()
    assert onnx_reads(deep(32)) is not None
    assert onnx_reads(deep(34)) is None
    refused(deep(34), "nested more than 100")


def test_deep_nesting_is_rejected_early_and_in_little_memory() -> None:
    assert sys.getrecursionlimit() < 2000  # a recursive reader would raise a RecursionError
    assert peak_while_refusing(deep(5000), "nested more than 100") < 1_000_000


@pytest.mark.parametrize(
    ("bomb", "match"),
    [
        (GRAPH + block(14, b"") * 40_000, "twice"),
        (block(7, block(11, b"") * 40_000), "more than 10000"),
        (block(7, block(11, block(2, block(1, block(2, block(1, b"") * 40_000))))), "axes"),
        (GRAPH + block(14, block(2, b"x" * 1000) * 17_000), "16 MiB of text"),
        (block(2, b"") * 40_000, "no graph"),
        (block(7, block(1, block(5, b"") * 40_000) + block(5, block(13, b""))), "another file"),
    ],
    ids=["metadata", "inputs", "axes", "text", "fields", "attributes"],
)
def test_many_small_fields_do_not_exhaust_memory(bomb: bytes, match: str) -> None:
    assert peak_while_refusing(bomb, match) < 5_000_000


def test_the_number_of_fields_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_metadata, "MAX_FIELDS", 1000)
    parse(GRAPH + (varint(5 << 3) + b"\x01") * 900)
    refused(GRAPH + (varint(5 << 3) + b"\x01") * 1001, "more than 1000 fields")
    refused(block(7, block(1, b"") * 1001), "more than 1000 fields")
    refused(block(25, block(7, b"") * 1001) + GRAPH, "more than 1000 fields")


def test_the_work_grows_with_file_size_not_nesting(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = 0
    field = onnx_metadata._Wire._field

    def counting(wire, begin: int, limit: int):
        nonlocal visited
        visited += 1
        return field(wire, begin, limit)

    monkeypatch.setattr(onnx_metadata._Wire, "_field", counting)
    for data in (deep(32), block(7, deep(31)[3:] * 40), block(7, block(11, b"") * 2000), small_bytes()):
        visited = 0
        parse(data)
        assert visited <= 4 * len(data)


def test_weights_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    model = small_model(small_graph(initializer=[weights(values=8 * 2**20)]))  # 32 MiB
    path.write_bytes(model.SerializeToString())
    del model
    tracemalloc.start()
    try:
        ours = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ours.size > 32 * 2**20
    assert peak < 1_000_000


# ----------------------------------------------------------------------------------------------- files on the disk


def test_missing_and_empty_files_folders_and_pipes_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    os.mkfifo(tmp_path / "pipe.onnx")  # without a writer: opening it would block
    for path, match in (
        (tmp_path / "missing.onnx", "no such file"),
        (tmp_path / "empty.onnx", "empty"),
        (tmp_path / "pipe.onnx", "not a regular file"),
        (tmp_path, "a folder"),
        (tmp_path / "empty.onnx" / "below", "no such file"),
    ):
        with pytest.raises(ModelError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_files_above_two_gibibytes_are_rejected_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.write(small_bytes())
        file.truncate(2**31)  # a sparse file, which occupies no space
    with pytest.raises(ModelError, match=r"huge\.onnx: 2\.0 GiB; .* less than 2 GiB"):
        read(path)


def test_a_damaged_file_is_rejected_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(small_bytes()[:-1])
    for _ in range(5):
        with pytest.raises(ModelError, match=r"cut\.onnx"):
            read(path)
    held = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert path not in held
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_without_read_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.onnx"
    path.write_bytes(small_bytes())

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)  # chmod does not restrict root
    with pytest.raises(ModelError, match=r"secret\.onnx: cannot be read \(Permission denied\)"):
        read(path)


def test_reading_imports_neither_onnx_nor_protobuf_nor_torch() -> None:
    code = (
        "import sys; from petseg_runtime import onnx_metadata; onnx_metadata.read(sys.argv[1]); "
        "print([m for m in ('onnx', 'google.protobuf', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(EDGE)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
