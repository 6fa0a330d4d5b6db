"""Complete exports that need more than a graph: int8 with labelled data, and TensorRT engines."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.util
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from petseg.checkpoint import load_model, save_checkpoint
from petseg.data import Split, find
from petseg.evaluate import evaluate, open_model
from petseg.metrics import counts
from petseg_export import (
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
    build,
    export,
    parity,
    tensorrt,
)
from petseg_export.config import EngineConfig
from petseg_export.deploy import DeployedUNet
from petseg_export.registry import FORMATS
from petseg_runtime import host
from petseg_runtime.artifact import RECEIPT_KEY, Artifact, open_artifact, sidecar_of
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.engines.tensorrt_build import Built, Profile, profile_of
from petseg_runtime.errors import (
    DataError,
    EngineError,
    EngineForeign,
    EngineMissing,
    ModelError,
    OutputError,
    ParityTolerance,
    UsageError,
)
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import ModelSpec
from petseg_runtime.verify import verify_artifact

QUANTIZE = QuantizeConfig(photos=6, judges=6, methods=("minmax", "entropy"), seed=5, budget=0.75)


@pytest.fixture(scope="module")
def quarter(trained: Any, meta: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained with a quarter of the 24 photos for validation."""
    path = tmp_path_factory.mktemp("quarter") / "best.safetensors"
    config = {"data": {"val_fraction": 0.25, "split_seed": 7}}
    save_checkpoint(path, trained.model.state_dict(), {**meta, "config": config})
    return path


@pytest.fixture(scope="module")
def int8(quarter: Path, oxford_root: Path, tracer: Any, tmp_path_factory: pytest.TempPathFactory) -> build.Exported:
    """An int8 ONNX file, tuned on the six validation photos, with a receipt of the test split. Read only."""
    file = tmp_path_factory.mktemp("int8") / "small.onnx"
    config = OnnxConfig(
        output=file,
        precision="int8",
        data=oxford_root,
        split="test",
        quantize=QUANTIZE,
        backends=("onnxruntime", "openvino"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "graph_bytes", tracer)
        return export(quarter, config)


@pytest.fixture(autouse=True)
def spare_tracing(known_graph: None) -> None:
    pass


# ------------------------------------------------------------------------------------------------ int8


def test_an_int8_file_records_how_it_was_quantized(int8: build.Exported) -> None:
    receipt = open_artifact(int8.path).receipt
    choice = receipt["quantization"]
    assert receipt["stored"] == open_artifact(int8.path).spec.precision == "int8"
    assert set(choice["methods"]) == {"minmax", "entropy"}
    assert choice["method"] in choice["methods"]
    assert choice["loss"] <= choice["budget"] == QUANTIZE.budget
    assert choice["layers_int8"] + len(choice["in_float"]) == choice["layers"] == len(choice["sensitivity"]) == 35
    assert (choice["calibrated_on"]["photos"], choice["judged_on"]["photos"]) == (6, 6)
    for row in receipt["rows"]:
        assert row["precision"] == "int8"
        assert row["task"]["photos"] == 6
        assert row["passed"]
    assert {row["engine"].split()[0] for row in receipt["rows"]} == {"onnxruntime", "openvino"}


def test_calibration_selection_and_receipt_use_different_photos(
    int8: build.Exported, quarter: Path, oxford_root: Path
) -> None:
    parts = {split: find(oxford_root, Split(split), val_fraction=0.25, seed=7) for split in ("train", "val", "test")}
    _, loaded = load_model(quarter)
    spec = open_artifact(int8.path).spec
    calibrated = parity.sample(parity.labelled(oxford_root, "train", loaded), QUANTIZE.photos, QUANTIZE.seed)
    choice = int8.receipt.quantization
    assert choice is not None
    assert choice["calibrated_on"] == parity.read(calibrated, spec).about
    assert choice["judged_on"] == parity.read(parts["val"], spec).about
    assert {pair.name for pair in calibrated} <= {pair.name for pair in parts["train"]}
    assert set(int8.receipt.names) == {pair.name for pair in parts["test"]}
    assert choice[build.SHARED] == 0
    assert not any("--split test" in note for note in int8.notes)


def test_a_receipt_on_the_int8_selection_photos_says_so(int8: build.Exported) -> None:
    choice = {**(int8.receipt.quantization or {}), build.SHARED: 6}
    (note,) = build._receipt_notes(dataclasses.replace(int8.receipt, quantization=choice))
    assert "chosen on 6 of the 6 photos of the parity test" in note
    assert "--split test" in note


@pytest.mark.parametrize("shared", [6, None])
@pytest.mark.parametrize("ran", [False, True])
def test_a_receipt_without_iou_has_no_note_on_shared_photos(
    int8: build.Exported, shared: int | None, ran: bool
) -> None:
    choice = {**(int8.receipt.quantization or {}), build.SHARED: shared}
    rows = tuple(dataclasses.replace(row, task=None) for row in int8.receipt.rows) if ran else ()
    note = "" if ran else "no NVIDIA GPU on the machine that built it"  # part of the receipt's summary
    assert build._receipt_notes(dataclasses.replace(int8.receipt, rows=rows, quantization=choice, note=note)) == ()


@pytest.mark.parametrize(("note", "doubt"), [("", "it may overlap"), ("it may overlap", "it may overlap")])
def test_a_doubt_about_the_int8_selection_photos_is_reported_once(int8: build.Exported, note: str, doubt: str) -> None:
    choice = {**(int8.receipt.quantization or {}), build.DOUBT: doubt}
    notes = build._receipt_notes(dataclasses.replace(int8.receipt, note=note, quantization=choice))
    assert notes == ("it may overlap; the IoU on such photos is optimistic",)


def test_a_receipt_without_a_nan_scan_says_so(int8: build.Exported) -> None:
    (note,) = build._receipt_notes(dataclasses.replace(int8.receipt, scan=None))
    assert "scanned for NaN" in note


def test_the_receipts_loss_matches_evaluate(int8: build.Exported, quarter: Path, oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.VAL, val_fraction=0.25, seed=7)
    ious = []
    for path in (quarter, int8.path):
        with open_model(path) as opened:
            result = evaluate(opened.run, pairs, opened.height, opened.width)
            ious.append(counts(result.total, opened.threshold).iou)
    assert int8.receipt.quantization is not None
    assert int8.receipt.quantization["iou"]["float"] == pytest.approx(ious[0], abs=1e-3)
    assert int8.receipt.quantization["iou"]["int8"] == pytest.approx(ious[1], abs=1e-3)


def test_too_few_selection_photos_are_rejected_early_with_a_remedy(
    quarter: Path, oxford_root: Path, tmp_path: Path
) -> None:
    config = OnnxConfig(output=tmp_path / "x.onnx", precision="int8", data=oxford_root)
    told: list[str] = []
    with pytest.raises(DataError, match="which has 6 photos, and 100 are required") as caught:
        export(quarter, config, lambda what, done, total: told.append(what))
    assert "--int8-judges" in str(caught.value)
    assert told == ["reading"]
    assert not list(tmp_path.iterdir())


def test_int8_without_calibration_photos_is_rejected_early(quarter: Path, folder_copy: Path, tmp_path: Path) -> None:
    names = [pair.name for pair in find(folder_copy, Split.TRAINVAL)]
    (folder_copy / "val.txt").write_text("\n".join(names))
    config = OnnxConfig(output=tmp_path / "x.onnx", precision="int8", data=folder_copy, quantize=QUANTIZE)
    told: list[str] = []
    with pytest.raises(DataError, match="the train split has no photos"):
        export(quarter, config, lambda what, done, total: told.append(what))
    assert told == ["reading"]


def test_an_unmet_int8_budget_writes_nothing(
    quarter: Path, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petseg_export import quantize

    coin = random.Random(0)
    judged = iter([0.9])
    monkeypatch.setattr(quantize, "judge_on", lambda photos: lambda graph: next(judged, coin.random() / 2))
    config = OnnxConfig(output=tmp_path / "x.onnx", precision="int8", data=oxford_root, quantize=QUANTIZE)
    with pytest.raises(ParityTolerance, match=r"budget is 0\.75"):
        export(quarter, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_wrong_normalisation_is_caught_at_float32_tolerance(
    precision: str, quarter: Path, oxford_root: Path, tmp_path: Path, tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised by 256, which the tolerances of fp16 and int8 do not catch."""

    def dimmed(deployed: DeployedUNet, spec: ModelSpec) -> bytes:
        proto = onnx.load_from_string(tracer(deployed, spec))
        (scale,) = (tensor for tensor in proto.graph.initializer if tensor.name == "scale")
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(255 / 256), "scale"))
        return proto.SerializeToString()

    monkeypatch.setattr(build, "graph_bytes", dimmed)
    quantize = QUANTIZE if precision == "int8" else QuantizeConfig()
    config = OnnxConfig(output=tmp_path / "x.onnx", precision=precision, data=oxford_root, quantize=quantize)
    with pytest.raises(ParityTolerance, match=r"^the traced ONNX graph \(fp32\) .* FAILED.*largest difference"):
        export(quarter, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.tensorrt
def test_a_wrong_float16_graph_is_not_compiled(
    quarter: Path, oxford_root: Path, tmp_path: Path, tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its float32 trace is correct; and the engine may not run on this machine."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")

    def shifted(deployed: DeployedUNet, spec: ModelSpec) -> bytes:
        proto = onnx.load_from_string(tracer(deployed, spec))
        for tensor in proto.graph.initializer:
            if tensor.name == "network.head.conv.bias":  # of a convolution that computes in float16
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float16(1), tensor.name))
        return proto.SerializeToString()

    monkeypatch.setattr(build, "graph_bytes", shifted)
    config = TensorRTRTXConfig(output=tmp_path / "x.engine", precision="fp16", data=oxford_root / "images")
    with pytest.raises(ParityTolerance, match=r"^the traced ONNX graph \(fp16\) .* FAILED"):
        export(quarter, config)
    assert not list(tmp_path.iterdir())


def test_int8_data_may_differ_from_the_receipts_data(
    trained: Any, meta: dict[str, Any], oxford_root: Path, tmp_path: Path
) -> None:
    path, data = tmp_path / "best.safetensors", {"names_sha256": "0" * 64, "skipped_without_pet": []}
    save_checkpoint(path, trained.model.state_dict(), {**meta, "data": data})
    config = OnnxConfig(
        output=tmp_path / "x.onnx",
        precision="int8",
        data=oxford_root / "images",
        quantize=QuantizeConfig(data=oxford_root, photos=2, judges=1, methods=("minmax",)),
    )
    done = export(path, config)
    assert done.receipt.photos == 30
    assert all(row.task is None for row in done.receipt.rows)
    (note,) = done.notes
    assert "is not what the model was validated on: photos that it was trained on may be among val" in note


# ------------------------------------------------------------------------------------------------ compiled from int8


@pytest.mark.parametrize("folder", ["", "images"])
def test_the_ir_of_an_int8_file_keeps_its_quantization_record(
    folder: str, int8: build.Exported, quarter: Path, oxford_root: Path, tmp_path: Path
) -> None:
    data = oxford_root / folder if folder else None
    config = OpenVINOConfig(output=tmp_path / "x.xml", precision="int8", onnx=int8.path, data=data, photos=4)
    done = export(quarter, config)
    assert done.receipt.quantization == open_artifact(int8.path).receipt["quantization"]
    assert {row.precision for row in done.receipt.rows} == {"int8"}
    assert open_artifact(done.path).identity == open_artifact(int8.path).identity


@pytest.mark.parametrize(("split", "shared"), [("val", 6), ("test", 0)])
def test_the_ir_of_an_int8_file_reports_shared_selection_photos(
    int8: build.Exported, quarter: Path, oxford_root: Path, tmp_path: Path, split: str, shared: int
) -> None:
    config = OpenVINOConfig(output=tmp_path / "x.xml", precision="int8", onnx=int8.path, data=oxford_root, split=split)
    done = export(quarter, config)
    assert done.receipt.quantization is not None
    assert done.receipt.quantization[build.SHARED] == shared
    assert sum("chosen on 6 of the 6 photos of the parity test" in note for note in done.notes) == (shared > 0)


@pytest.mark.parametrize("change", ["other pixels", "no such part"])
def test_unknown_int8_selection_photos_are_reported(
    int8: build.Exported,
    quarter: Path,
    oxford_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    labelled = parity.labelled

    def another(data: Path, split: str, loaded: Any) -> Any:
        if split != "val":
            return labelled(data, split, loaded)
        if change == "no such part":
            raise DataError("no photos in it")
        return labelled(data, "train", loaded)[:6]

    monkeypatch.setattr(parity, "labelled", another)
    file = tmp_path / "x.xml"
    config = OpenVINOConfig(output=file, precision="int8", onnx=int8.path, data=oxford_root, split="test")
    done = export(quarter, config)
    assert done.receipt.quantization is not None
    assert done.receipt.quantization[build.SHARED] is None
    assert any("it is not known whether it was tuned on photos of the parity test" in note for note in done.notes)


@pytest.mark.parametrize("damaged", [5, {}, {"budget": "0.5"}], ids=str)
def test_a_damaged_quantization_record_is_rejected(
    int8: build.Exported, quarter: Path, tmp_path: Path, damaged: Any
) -> None:
    given, file = open_artifact(int8.path), tmp_path / "given.onnx"
    assert given.onnx is not None
    receipt = json.dumps({**given.receipt, "quantization": damaged})
    file.write_bytes(with_metadata(int8.path.read_bytes(), {**given.onnx.metadata, RECEIPT_KEY: receipt}))
    with pytest.raises(ModelError, match=r"given\.onnx: its receipt is damaged \(quantization "):
        export(quarter, OpenVINOConfig(output=tmp_path / "x.xml", precision="int8", onnx=file, photos=1))
    assert list(tmp_path.iterdir()) == [file]


def test_a_whole_number_of_points_is_a_valid_budget() -> None:
    assert build._budget({"budget": 1}) == 1


# ------------------------------------------------------------------------------------------------ engines


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_rtx_engine_is_built_and_marked_as_not_run(
    precision: str, int8: build.Exported, quarter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    if build.nvidia_gpus():
        pytest.skip("with a GPU the engine is run, or the receipt says why not")
    given = int8.path if precision == "int8" else None
    done = export(quarter, TensorRTRTXConfig(output=tmp_path / "x.engine", precision=precision, onnx=given))
    assert [file.name for file in done.files] == ["x.engine", "x.engine.json", "x.engine.parity.npz"]
    assert done.receipt.kind == "built, not run"
    assert done.receipt.note.startswith("no NVIDIA GPU on the machine that built it; ")
    assert done.receipt.passed is None
    artifact = open_artifact(done.path)
    assert (artifact.format, artifact.spec.precision) == ("trt-rtx", precision)
    assert artifact.environment["library"] == "tensorrt_rtx"
    sidecar = json.loads(sidecar_of(done.path).read_text())
    assert sidecar["files"] == {".engine": hashlib.sha256(done.path.read_bytes()).hexdigest()}
    computed = {kind for row in artifact.environment["engine"]["computed"] for kind in row["reads"]}
    assert precision in computed
    with pytest.raises(EngineError):  # no GPU: an error, and no other device is used
        verify_artifact(artifact)
    if given:
        assert artifact.identity == open_artifact(given).identity
        assert done.receipt.quantization == open_artifact(given).receipt["quantization"]


@pytest.mark.tensorrt
def test_a_graph_that_tensorrt_cannot_parse_writes_nothing(
    exported: Any, checkpoint_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    spoilt = tmp_path / "spoilt.onnx"
    proto = onnx.load(exported.file)
    next(node for node in proto.graph.node if node.op_type == "Sigmoid").op_type = "Sigmund"
    metadata = open_artifact(exported.file).onnx
    assert metadata is not None
    about = {key: text for key, text in metadata.metadata.items() if key != RECEIPT_KEY}  # it certifies the other file
    spoilt.write_bytes(with_metadata(proto.SerializeToString(), about))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="Sigmund"):
        export(checkpoint_file, TensorRTRTXConfig(output=tmp_path / "out" / "x.engine", onnx=spoilt))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.tensorrt
def test_a_modified_engine_file_is_rejected(quarter: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    done = export(quarter, TensorRTRTXConfig(output=tmp_path / "x.engine", photos=1))
    data = bytearray(done.path.read_bytes())
    data[len(data) // 2] ^= 1
    done.path.write_bytes(data)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        open_artifact(done.path)
    shutil.move(sidecar_of(done.path), tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=r"sidecar file .* is missing"):
        open_artifact(done.path)


@pytest.mark.parametrize(
    ("spec", "config", "shapes"),
    [
        ({"batch": 4}, {}, None),
        ({}, {}, ((1, 64, 48, 3), (1, 64, 48, 3), (8, 64, 48, 3))),
        ({}, {"max_batch": 2}, ((1, 64, 48, 3), (1, 64, 48, 3), (2, 64, 48, 3))),
        ({"dynamic_size": True}, {}, ((1, 16, 16, 3), (1, 64, 48, 3), (8, 128, 96, 3))),
        ({"dynamic_size": True, "batch": 2}, {}, ((2, 16, 16, 3), (2, 64, 48, 3), (2, 128, 96, 3))),
        ({"dynamic_size": True}, {"max_size": (64, 512)}, ((1, 16, 16, 3), (1, 64, 48, 3), (8, 64, 512, 3))),
    ],
)
def test_the_profile_follows_from_the_specification(
    spec: dict[str, Any], config: dict[str, Any], shapes: tuple[tuple[int, ...], ...] | None
) -> None:
    asked = TensorRTConfig(**config)
    profile = profile_of(ModelSpec(name="x", height=64, width=48, **spec), asked.max_batch, asked.max_size)
    assert (profile and (profile.minimum, profile.optimum, profile.maximum)) == shapes


@pytest.mark.parametrize("kind", [TensorRTConfig, TensorRTRTXConfig])
@pytest.mark.parametrize(
    ("spec", "asked", "said"),
    [
        (
            {"dynamic_size": True},
            {"max_size": (16, 512)},
            "max_size is 16 x 512; it must be at least the model's 64 x 48",
        ),
        ({"dynamic_size": True}, {"max_size": (64, 32)}, "max_size is 64 x 32; it must"),
        ({}, {"max_size": (64, 48)}, "max_size needs a graph of dynamic size"),
        ({"batch": 1}, {"max_batch": 2}, "dynamic batch, and this one has a batch of 1"),
    ],
)
def test_limits_that_contradict_the_graph_are_usage_errors(
    kind: type[EngineConfig], spec: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build._check_limits(kind(**asked), ModelSpec(name="x", height=64, width=48, **spec))


@pytest.mark.parametrize("kind", [TensorRTConfig, TensorRTRTXConfig])
def test_the_models_own_size_may_be_the_largest(kind: type[EngineConfig]) -> None:
    build._check_limits(kind(max_size=(64, 48)), ModelSpec(name="x", height=64, width=48, dynamic_size=True))


def test_limits_are_checked_early(
    checkpoint_file: Path, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # a machine with TensorRT and a GPU
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    for asked, said in (
        ({"dynamic_size": True, "max_size": (16, 64)}, "it must be at least the"),
        ({"max_size": (64, 64)}, "add --dynamic-size"),
        ({"onnx": exported.file, "max_size": (64, 64)}, f"that of {exported.file} is fixed: omit it"),
    ):
        with pytest.raises(UsageError, match=rf"max_size .*{re.escape(said)}"):
            export(checkpoint_file, TensorRTConfig(output=tmp_path / "x.engine", **asked))
    assert not list(tmp_path.iterdir())


class Cudart:
    """A stand-in for the CUDA runtime with two GPUs, which can only select one."""

    class cudaError_t(enum.Enum):
        cudaSuccess = 0
        cudaErrorInvalidDevice = 101

    def __init__(self) -> None:
        self.chosen: list[int] = []

    def cudaSetDevice(self, gpu: int) -> tuple[cudaError_t]:
        self.chosen.append(gpu)
        return (self.cudaError_t.cudaSuccess if gpu < 2 else self.cudaError_t.cudaErrorInvalidDevice,)


@pytest.mark.parametrize(("device", "gpu"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_an_engine_is_built_for_the_requested_gpu(
    device: str, gpu: int, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    cudart = Cudart()

    def record(graph: bytes, profile: Profile | None, **more: Any) -> Built:
        asked.update(more, profile=profile)
        return Built(engine=b"engine", environment={}, description={}, messages=())

    monkeypatch.setattr(tensorrt, "build", record)
    monkeypatch.setattr(tensorrt, "timings_slot", lambda gpu: f"timings of {gpu}")
    monkeypatch.setattr(tensorrt, "imported", lambda module, library: cudart)
    output = tmp_path / "x.engine"
    config = TensorRTConfig(device=device, max_batch=2)
    record_of = tensorrt.compile_tensorrt(open_artifact(exported.file), output, config, lambda *_: None)
    assert record_of == {"engine": {}, "messages": []}
    assert output.read_bytes() == b"engine"
    assert (asked["device"], asked["timing_cache"]) == (gpu, f"timings of {gpu}")
    assert asked["profile"].maximum == (2, 32, 32, 3)
    asked["activate"]()
    assert cudart.chosen == [gpu], "CUDA has a current GPU per thread, and the library builds for that one"


def test_building_for_a_nonexistent_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "imported", lambda module, library: Cudart())
    with pytest.raises(EngineError, match=r"cuda:2 cannot be used to build an engine \(cudaErrorInvalidDevice\)"):
        tensorrt._activate(2)


def test_a_checkpoint_is_never_overwritten(checkpoint_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(checkpoint_file, tmp_path / "odd.onnx"))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="--output"):
        export(path, OnnxConfig(photos=1))
    assert path.read_bytes() == before


def test_a_larger_budget_is_the_receipts_tolerance(int8: build.Exported) -> None:
    assert {row.tolerance.task_loss for row in int8.receipt.rows} == {QUANTIZE.budget}


def compile_nothing(source: Artifact, file: Path, *rest: Any) -> dict[str, Any]:
    """A stand-in for the compiler of a format."""
    file.write_bytes(b"engine")
    return {}


def test_a_driver_that_does_not_start_is_why_an_engine_is_not_run(
    quarter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    monkeypatch.setattr(tensorrt, "compile_tensorrt_rtx", compile_nothing)
    monkeypatch.setattr(build, "nvidia_gpus", lambda: 0)
    monkeypatch.setattr(build, "driver_trouble", lambda: "the driver does not start: reboot")
    receipt = export(quarter, TensorRTRTXConfig(output=tmp_path / "x.engine", photos=1)).receipt
    assert receipt.note == "the driver does not start: reboot; run `petseg verify` on the device"


@pytest.mark.parametrize(
    ("error", "foreign"),
    [
        (EngineMissing("cuda-bindings is not installed"), True),
        (EngineError("cannot run it: an illegal memory access"), True),
        (EngineForeign("built for 8.9"), True),
        (EngineForeign("built for 8.9"), False),
    ],
)
def test_only_an_engine_for_another_gpu_is_not_run(
    error: EngineError, foreign: bool, quarter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU, anything missing is an error; an engine that may be for other GPUs is reported as not run."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")

    def refuse(artifact: Artifact, *rest: Any, **options: Any) -> Engine:
        if artifact.format == "onnx":  # the graph that the engine is built from
            return load_engine(artifact, *rest, **options)
        raise error

    monkeypatch.setattr(tensorrt, "compile_tensorrt_rtx", compile_nothing)
    monkeypatch.setattr(parity, "overlap_warning", lambda *of: "a doubt about the IoU, if it were computed")
    if not foreign:
        monkeypatch.setitem(FORMATS, "trt-rtx", dataclasses.replace(FORMATS["trt-rtx"], foreign=False))
    monkeypatch.setattr(build, "nvidia_gpus", lambda: 1)
    monkeypatch.setattr("petseg_runtime.parity.load_engine", refuse)
    config = TensorRTRTXConfig(output=tmp_path / "x.engine", photos=1)
    if not (foreign and isinstance(error, EngineForeign)):
        with pytest.raises(type(error), match=str(error)[:13]):
            export(quarter, config)
        assert list(tmp_path.iterdir()) == []
    else:
        receipt = export(quarter, config).receipt
        assert receipt.kind == "built, not run"
        assert "built for 8.9" in receipt.note
