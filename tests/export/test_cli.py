"""`petseg export` as people and scripts use it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import pytest

from command_line import failed
from petseg.cli import run
from petseg_export import (
    ExportConfig,
    OnnxConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
    build,
    cli,
    registry,
)
from petseg_export.parity import sample
from petseg_runtime import host, parity
from petseg_runtime.artifact import open_artifact, sample_photos
from petseg_runtime.errors import DataError
from petseg_runtime.extras import install
from petseg_runtime.onnx_metadata import with_metadata

COMMAND = [sys.executable, "-m", "petseg.cli", "export"]


@pytest.fixture
def checkpoint(checkpoint_file: Path, tmp_path: Path) -> Path:
    """A copy of the session's checkpoint in a new folder."""
    return Path(shutil.copy(checkpoint_file, tmp_path / "best.safetensors"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def size(file: Path) -> str:
    there = file.stat().st_size
    return f"{there / 1e6:.1f} MB" if there >= 1e5 else f"{there / 1e3:.1f} kB"


def test_the_file_is_written_beside_the_checkpoint_and_reported(
    checkpoint: Path, known_graph: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(checkpoint)]) == 0
    file = checkpoint.with_suffix(".onnx")
    proof = file.with_name("best.onnx.parity.npz")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{file} ({size(file)})",
        f"{proof} ({size(proof)})",
        f"parity smoke, {len(sample_photos())} photos (a full test needs 16)",
        f"  {open_artifact(file).receipt['rows'][0]['summary']}",
    ]
    assert "  passed, f32 in onnxruntime" in out
    assert not err
    assert names(checkpoint.parent) == {"best.safetensors", file.name, proof.name}


def test_json_output_is_only_the_receipt(
    checkpoint: Path, known_graph: None, tmp_path: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "model.onnx"
    args = ["export", str(checkpoint), "-o", str(output), "--name", "mine", "--data", str(oxford_root), "--json"]
    assert run([*args, "--split", "test"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    artifact = open_artifact(output)
    assert printed.pop("file") == str(output)
    assert printed.pop("files") == [str(output), f"{output}.parity.npz"]
    assert printed == artifact.receipt
    assert (printed["photos"], printed["kind"], printed["passed"]) == (6, "smoke", True)
    assert printed["rows"][0]["task"]["photos"] == 6
    assert artifact.spec.name == "mine"
    assert not err


def test_quiet_prints_nothing(checkpoint: Path, known_graph: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it warn, as of this size; see below."""
    assert run(["export", str(checkpoint), "-q", "--photos", "1", "--size", "16x32", "--batch", "3"]) == 0
    assert capsys.readouterr() == ("", "")
    assert open_artifact(checkpoint.with_suffix(".onnx")).receipt["photos"] == 1


def test_every_option_is_applied_to_the_file(
    checkpoint: Path, notes_file: Path, photos: list[Path], known_graph: None, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", str(checkpoint), "--size", "16x48", "--notes", str(notes_file), "--photos", "2", "--batch", "3"]
    assert run([*args, "--data", str(photos[0].parent), "--precision", "fp16", "--seed", "5"]) == 0
    artifact = open_artifact(checkpoint.with_suffix(".onnx"))
    spec = artifact.spec
    assert (spec.height, spec.width, spec.batch, spec.precision, spec.dynamic_size) == (16, 48, 3, "fp16", False)
    assert artifact.provenance["measured"] == {"iou": 0.9}
    assert artifact.receipt["names"] == [photo.name for photo in sample(photos, 2, seed=5)]
    # The file matches the checkpoint, which was trained at another size.
    assert re.fullmatch(
        rf"petseg: {checkpoint}: trained at \d+ x \d+; at 16 x 48 its masks may be much worse: .*\n",
        capsys.readouterr().err,
    )


ENGINE = ["--max-batch", "4", "--max-size", "64x96", "--onnx", "m.onnx"]


@pytest.mark.parametrize(
    ("format_name", "kind", "args", "fields"),
    [
        ("onnx", OnnxConfig, [], {}),
        ("trt", TensorRTConfig, [*ENGINE, "--timing-cache", "t"], {"timing_cache": Path("t")}),
        (
            "trt-rtx",
            TensorRTRTXConfig,
            [*ENGINE, "--compute-capability", "8.9", "--compute-capability", "12.0"],
            {"compute_capabilities": ("8.9", "12.0")},
        ),
    ],
)
def test_every_option_reaches_its_setting(
    format_name: str,
    kind: type[ExportConfig],
    args: list[str],
    fields: dict[str, Any],
    notes_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def record(*request: Any) -> None:
        asked.append(request)
        raise DataError("recorded")

    monkeypatch.setattr("petseg_export.cli.check", lambda config: None)
    monkeypatch.setattr(build, "export", record)
    common = "--precision int8 -o x --size 32x48 --dynamic-size --batch 3 --name mine --certain-share 0.25 --data d"
    more = "--split test --photos 7 --seed 5 --backend onnxruntime --backend openvino --device cuda:1 --threads 3"
    int8 = "--int8-data e --int8-budget 0.75 --int8-photos 9 --int8-judges 8"
    options = [*f"{common} {more} {int8}".split(), "--notes", str(notes_file), *args]
    assert run(["export", "best.safetensors", "--format", format_name, *options]) == 8
    ((checkpoint, config, _),) = asked
    assert checkpoint == Path("best.safetensors")
    engine = {"max_batch": 4, "max_size": (64, 96), "onnx": Path("m.onnx")} if args else {}
    assert config == kind(
        output=Path("x"),
        name="mine",
        precision="int8",
        height=32,
        width=48,
        dynamic_size=True,
        batch=3,
        certain_share=0.25,
        data=Path("d"),
        split="test",
        photos=7,
        seed=5,
        backends=("onnxruntime", "openvino"),
        device="cuda:1",
        threads=3,
        quantize=QuantizeConfig(data=Path("e"), budget=0.75, photos=9, judges=8),
        notes={"measured": {"iou": 0.9}},
        **engine,
        **fields,
    )


def test_the_defaults_are_those_of_the_python_api() -> None:
    shown = {option.name: option.help for option in cli.export.params if isinstance(option, click.Option)}
    quantize, engine = QuantizeConfig(), TensorRTConfig()
    for name in ("budget", "photos", "judges"):
        assert f"[default: {getattr(quantize, name)}]" in shown[f"int8_{name}"]
    assert f"[default: {engine.max_batch}]" in shown["max_batch"]
    defaults = {option.name: option.default for option in cli.export.params}
    for name in ("name", "precision", "split", "photos", "seed", "device"):
        assert defaults[name] == getattr(OnnxConfig(), name)


def test_an_engine_that_was_not_run_is_reported_as_such(
    exported: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = dataclasses.replace(exported.receipt, rows=(), note="no NVIDIA GPU here")
    monkeypatch.setattr(build, "export", lambda *request: build.Exported(exported.file, (exported.file,), receipt))
    assert run(["export", "best.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"parity {receipt.summary}"]


def test_an_ir_from_an_onnx_file_in_two_steps(
    checkpoint: Path, known_graph: None, tmp_path: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(oxford_root / "images")]
    assert run(["export", str(checkpoint), *data, "--backend", "onnxruntime", "--backend", "openvino"]) == 0
    onnx_file = checkpoint.with_suffix(".onnx")
    assert len(open_artifact(onnx_file).receipt["rows"]) >= 2
    capsys.readouterr()
    args = ["export", str(checkpoint), "--format", "openvino", "--onnx", str(onnx_file), "--precision", "fp16", *data]
    assert run(args) == 0
    out = capsys.readouterr().out
    files = [checkpoint.with_name(f"best{end}") for end in (".xml", ".bin", ".xml.json", ".xml.parity.npz")]
    assert [line.rpartition(" (")[0] for line in out.splitlines()[:4]] == [str(file) for file in files]
    assert "parity full, 30 photos" in out
    assert open_artifact(files[0]).spec.precision == "fp16"
    assert run(["verify", str(files[0]), "-q"]) == 0


# -------------------------------------------------------------------------------------------- separate processes


def test_a_separate_process_exports_the_identical_graph(
    checkpoint_file: Path, tmp_path: Path, photos: list[Path], exported: Any
) -> None:
    """So anyone with the checkpoint can check a file that they were given. And stderr is empty."""
    output = tmp_path / "out.onnx"
    command = [*COMMAND, str(checkpoint_file), "-o", str(output), "--data", str(photos[0].parent), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    assert not done.stderr, "neither the exporter's warnings nor its progress"
    first, second = open_artifact(exported.file), open_artifact(output)
    assert second.receipt["photos"] == 30
    assert second.identity == first.identity
    assert with_metadata(output.read_bytes(), first.onnx.metadata) == exported.file.read_bytes()


def test_ctrl_c_during_an_export_leaves_no_files(checkpoint: Path) -> None:
    before = b"the file of an earlier export"
    checkpoint.with_suffix(".xml").write_bytes(before)
    here = names(checkpoint.parent)
    command = [*COMMAND, str(checkpoint), "--format", "openvino"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        patience = time.monotonic() + 120
        while names(checkpoint.parent) == here and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.02)
        assert process.poll() is None, "its temporary folder has appeared"
        time.sleep(0.3)  # it is tracing, which takes seconds
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    # Python is killed by the signal if it arrives during an `exec` (a dataclass in an import, for example); a shell
    # shows that as 130, too.
    assert process.returncode in (130, -signal.SIGINT)
    assert (out, err.strip()) == ("", "petseg: interrupted")
    assert names(checkpoint.parent) == here
    assert checkpoint.with_suffix(".xml").read_bytes() == before


#: Runs many command lines in one process, and prints the heavy packages that are imported after each.
MANY = """
import json, sys
from petseg.cli import run
for args in json.loads(sys.argv[1]):
    print(json.dumps(args), file=sys.stderr)
    code = run(args)
    heavy = {"torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx"} & set(sys.modules)
    print(f"CODE {code} {sorted(heavy)}", file=sys.stderr)
"""

REFUSED: list[tuple[list[str], int, str]] = [
    (["--size", "33"], 2, "height is 33; it must be a positive multiple of 16"),
    (["--size", "0"], 2, "height is 0"),
    (["--size", "16x24"], 2, "width is 24"),
    (["--dynamic-size", "--size", "20"], 2, "height is 20"),
    (["--batch", "0"], 2, "'0'; a positive integer or 'dynamic' is expected"),
    (["--batch", "-1"], 2, "'-1'; a positive integer"),
    (["--batch", "x"], 2, "'x'; a positive integer"),
    (["--batch", "2.5"], 2, "--batch"),
    (["--batch", "³"], 2, "--batch"),
    (["--batch", "9" * 5000], 2, "--batch"),
    (["--max-batch", "8"], 2, "--max-batch: does not apply to --format onnx"),
    (["--max-size", "64"], 2, "--max-size: does not apply to --format onnx"),
    (["--compute-capability", "8.9"], 2, "--compute-capability: does not apply to --format onnx"),
    (["--gpu", "8.9"], 2, "No such option"),
    (["-o", "x.foo"], 2, "x.foo: onnx files end in .onnx; rename it, or choose another --format"),
    (["--timing-cache", "t"], 2, "--timing-cache: does not apply to --format onnx"),
    (["--onnx", "m.onnx"], 2, "--onnx: does not apply to --format onnx"),
    (["--format", "openvino", "--max-batch", "8"], 2, "--max-batch: does not apply to --format openvino"),
    (["--format", "trt", "--compute-capability", "8.9"], 2, "--compute-capability: does not apply to --format trt"),
    (["--format", "trt-rtx", "--timing-cache", "t"], 2, "--timing-cache: does not apply to --format trt-rtx"),
    (["--format", "trt-rtx", "--compute-capability", "x"], 2, "compute capability 'x': a string such as 8.9"),
    (["--format", "trt-rtx", "--max-batch", "0"], 2, "max_batch is 0"),
    (["--precision", "int8"], 2, "labelled photos: give their folder with --data"),
    (["--threads", "0"], 2, "--threads"),
    (["--certain-share", "0"], 2, "--certain-share"),
    (["--device", "gpu"], 5, "unknown device 'gpu'; choose one of: auto, cpu"),
    (
        ["--format", "openvino", "--device", "cuda"],
        5,
        "openvino: openvino cannot run it on cuda:0; supported: openvino on cpu",
    ),
    (["--precision", "bf16"], 2, "--precision"),
    (["--int8-budget", "-1"], 2, "--int8-budget"),
    (["--int8-judges", "0", "--precision", "int8"], 2, "validation photos of int8 is 0"),
    (["--int8-photos", "7"], 2, "int8 options (--int8-...) have no effect: the precision is fp32"),
    (["--format", "trt-rtx", "--batch", "1", "--max-batch", "4"], 2, "max_batch needs a graph with a dynamic batch"),
    (["--backend", "nonsense"], 5, "unknown engine 'nonsense'; choose one of: auto, onnxruntime"),
    (["--split", "train"], 2, "--split"),
]


def test_impossible_requests_are_rejected_before_heavy_imports(tmp_path: Path) -> None:
    """The checkpoint does not even exist, so nothing has tried to read it."""
    lines = [["export", str(tmp_path / "none.safetensors"), *options] for options, _, _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MANY, json.dumps(lines)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    told = done.stderr.split("\nCODE ")
    assert len(told) == len(REFUSED) + 1
    for (options, code, part), message, after in zip(REFUSED, told, told[1:], strict=False):
        assert part in " ".join(message.split()), options
        assert after.startswith(f"{code} []"), options
        assert "Traceback" not in message
    assert not list(tmp_path.iterdir())


LIST = """
import sys
from petseg.cli import run
code = run(["export", "--list"])
heavy = {"torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_the_list_of_formats_needs_neither_torch_nor_a_checkpoint() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIST], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, form in registry.FORMATS.items():
        assert name in done.stdout
        assert form.help in done.stdout
        assert form.proven in done.stdout
    assert done.stdout.count("available here") >= 1, "at least ONNX"


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_list_shows_missing_requirements(
    gpus: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object() if name != "openvino" else None)
    monkeypatch.setattr(host, "nvidia_gpus", lambda: gpus)
    assert run(["export", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {lines[i].split()[0]: lines[i + 2].strip() for i in range(0, len(lines), 3)}
    assert list(verdicts) == list(registry.FORMATS)
    assert verdicts["onnx"] == verdicts["trt-rtx"] == "available here"
    assert verdicts["openvino"] == f"not available here: openvino is not installed: {install('openvino')}"
    assert verdicts["trt"].startswith("available" if gpus else "not available here: no NVIDIA GPU")
    assert run(["export", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema_version"] == 1
    formats = {form["name"]: form for form in listed["formats"]}
    assert list(formats) == list(registry.FORMATS)
    assert formats["onnx"]["why_not"] is None
    assert verdicts["openvino"] == f"not available here: {formats['openvino']['why_not']}"
    assert (formats["trt"]["suffix"], formats["trt"]["precisions"]) == (".engine", ["fp32", "fp16", "int8"])
    assert {"help", "proven"} <= formats["trt"].keys()


def test_a_missing_checkpoint_argument_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export"]) == 2
    assert "Missing argument 'CHECKPOINT'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ failures


def test_tensorrt_without_package_or_gpu_is_an_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["export", str(checkpoint), "--format", "trt"]
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object() if name != "tensorrt" else None)
    code, message = failed(args, capsys)
    assert (code, message) == (7, f"petseg: trt: tensorrt is not installed: {install('trt')}\n")
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object())
    code, message = failed(args, capsys)
    assert code == 5
    assert message.startswith("petseg: trt: no NVIDIA GPU here")
    assert "export to ONNX here" in message
    assert names(checkpoint.parent) == {"best.safetensors"}


def test_a_truncated_checkpoint_is_a_bad_model_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    code, message = failed(["export", str(checkpoint)], capsys)
    assert code == 4
    assert message.startswith(f"petseg: {checkpoint}: not a readable safetensors checkpoint")
    assert names(checkpoint.parent) == {"best.safetensors"}


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.safetensors"
    assert failed(["export", str(path)], capsys) == (4, f"petseg: {path}: no such file\n")


def test_a_folder_as_checkpoint_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in ([str(tmp_path), "-o", str(tmp_path / "out.onnx")], ["."]):
        code, message = failed(["export", *args], capsys)
        assert code == 4
        assert message.startswith(f"petseg: {args[0]}: a folder; give the checkpoint in it")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", ["empty", "nowhere", "notes.json"])
def test_data_without_photos_is_a_data_error(
    checkpoint: Path, notes_file: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    code, message = failed(["export", str(checkpoint), "--data", str(tmp_path / data)], capsys)
    assert code == 8
    assert f"--data {tmp_path / data}" in message
    assert names(tmp_path) == {"best.safetensors", "notes.json", "empty"}


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "\udcff", None], ids=lambda text: str(text)[:5])
def test_notes_that_are_not_a_json_object_are_rejected(
    checkpoint: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "n.json"
    if text is not None:
        notes.write_bytes(text.encode(errors="surrogateescape"))
    code, message = failed(["export", str(checkpoint), "--notes", str(notes)], capsys)
    assert code == 8
    assert f"--notes {notes}" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "nonsense"],
        ["--size", "big"],
        ["--size", "32x32x3"],
        ["--size", ""],
        ["--size", "-16"],
        ["--size", "3²"],
        ["--photos", "0"],
        ["--max-size", "big", "--format", "trt-rtx"],
        ["--no-such-option"],
    ],
)
def test_an_invalid_command_line_exits_with_2(
    checkpoint: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["export", str(checkpoint), *options], capsys)
    assert code == 2
    assert options[0] in message
    assert names(checkpoint.parent) == {"best.safetensors"}


def test_a_failed_receipt_exits_with_10(
    checkpoint: Path, known_graph: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = parity.Tolerance(max_difference=-1, min_mask_iou=0.999)
    monkeypatch.setitem(parity.TOLERANCES, "f32", strict)
    code, message = failed(["export", str(checkpoint)], capsys)
    assert code == 10
    assert "FAILED" in message
    assert "allowed -1/255" in message
    assert names(checkpoint.parent) == {"best.safetensors"}


def test_no_folder_for_temporary_files_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert run(["export", str(checkpoint)]) == 1
    said = "petseg: no folder for temporary files can be written to; name one in the variable TMPDIR\n"
    assert capsys.readouterr() == ("", said)


def test_an_unwritable_output_exits_with_6(
    checkpoint: Path, known_graph: None, notes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["export", str(checkpoint), "-o", str(notes_file / "x.onnx")], capsys)
    assert code == 6
    assert str(notes_file / "x.onnx") in message


def test_a_mismatched_onnx_file_is_a_usage_error_and_a_missing_one_a_model_error(
    checkpoint: Path, exported_half: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", str(checkpoint), "--format", "openvino", "--onnx"]
    code, message = failed([*args, str(exported_half.file)], capsys)
    assert (code, "the file is fp16, not fp32; use --precision fp16" in message) == (2, True)
    code, message = failed([*args, str(tmp_path / "none.onnx")], capsys)
    assert (code, "none.onnx: no such file" in message) == (4, True)
