"""`petseg export` as people and scripts use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from petseg.cli import run
from petseg_export import cli as export_cli
from petseg_export import parity
from petseg_runtime.artifact import open_artifact, sample_photos


@pytest.fixture
def checkpoint(checkpoint_file: Path, tmp_path: Path) -> Path:
    """The session's checkpoint in a folder of the test's own."""
    return Path(shutil.copy(checkpoint_file, tmp_path / "best.safetensors"))


def test_the_file_lies_beside_the_checkpoint_and_people_are_told(
    checkpoint: Path, known_graph: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(checkpoint)]) == 0
    file = checkpoint.with_suffix(".onnx")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == f"{file} ({file.stat().st_size / 1e6:.1f} MB)"
    assert second == f"parity {open_artifact(file).receipt['summary']}"
    assert f"passed (smoke, {len(sample_photos())} photos, f32" in second
    assert not err
    assert {path.name for path in checkpoint.parent.iterdir()} == {"best.safetensors", "best.onnx"}


def test_json_is_the_receipt_and_nothing_else(
    checkpoint: Path, known_graph: bytes, tmp_path: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "model.onnx"
    args = ["export", str(checkpoint), "-o", str(output), "--name", "mine", "--data", str(oxford_root), "--json"]
    assert run(args) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    artifact = open_artifact(output)
    assert printed.pop("file") == str(output)
    assert printed == artifact.receipt
    assert (printed["photos"], printed["kind"], printed["passed"]) == (30, "full", True)
    assert artifact.spec.name == "mine"
    assert not err


def test_quiet_says_nothing(checkpoint: Path, known_graph: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(checkpoint), "-q", "--photos", "1"]) == 0
    assert capsys.readouterr() == ("", "")
    assert open_artifact(checkpoint.with_suffix(".onnx")).receipt["photos"] == 1


def test_notes_and_size_reach_the_file(checkpoint: Path, notes_file: Path, photos: list[Path]) -> None:
    args = ["export", str(checkpoint), "--size", "16x32", "--notes", str(notes_file), "--photos", "2"]
    assert run([*args, "--data", str(photos[0].parent)]) == 0
    artifact = open_artifact(checkpoint.with_suffix(".onnx"))
    assert (artifact.spec.height, artifact.spec.width) == (16, 32)
    assert artifact.provenance["measured"] == {"iou": 0.9}
    assert artifact.receipt["photos"] == 2


def test_a_choice_of_photos_is_the_same_for_the_same_seed(photos: list[Path]) -> None:
    folder = photos[0].parent
    chosen = export_cli._photos(folder, 5, seed=0)
    assert len(set(chosen)) == 5
    assert set(chosen) <= set(photos)
    assert chosen == export_cli._photos(folder.parent, 5, seed=0), "a data set's images/ folder is found"
    assert chosen != export_cli._photos(folder, 5, seed=1)
    assert export_cli._photos(folder, 200, seed=0) == photos


def test_a_real_process_exports_a_file(checkpoint: Path, photos: list[Path]) -> None:
    command = [sys.executable, "-m", "petseg.cli", "export", str(checkpoint), "--data", str(photos[0].parent), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    assert not done.stderr, "neither the exporter's warnings nor its progress"
    assert open_artifact(checkpoint.with_suffix(".onnx")).receipt["photos"] == 30


def failed(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command line that must fail, with nothing on stdout and no traceback."""
    code = run(args)
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    return code, err


def test_a_truncated_checkpoint_is_a_bad_model_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    code, message = failed(["export", str(checkpoint)], capsys)
    assert code == 4
    assert message.startswith(f"petseg: {checkpoint}: not a readable safetensors checkpoint")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best.safetensors"]


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.safetensors"
    assert failed(["export", str(path)], capsys) == (4, f"petseg: {path}: no such file\n")


def test_a_folder_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failed(["export", str(tmp_path)], capsys)
    assert code == 4
    assert str(tmp_path) in message


@pytest.mark.parametrize("data", ["empty", "nowhere", "notes.json"])
def test_data_without_photos_is_a_bad_data_set(
    checkpoint: Path, notes_file: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    code, message = failed(["export", str(checkpoint), "--data", str(tmp_path / data)], capsys)
    assert code == 8
    assert f"--data {tmp_path / data}" in message
    assert not checkpoint.with_suffix(".onnx").exists()


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_notes_that_are_no_json_object_are_refused(
    checkpoint: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "n.json"
    if text is not None:
        notes.write_text(text)
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
        ["--no-such-option"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    checkpoint: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["export", str(checkpoint), *options], capsys)
    assert code == 2
    assert options[0] in message
    assert not checkpoint.with_suffix(".onnx").exists()


@pytest.mark.parametrize("size", ["33", "0", "16x24"])
def test_a_size_that_is_no_multiple_of_16_is_refused(
    checkpoint: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["export", str(checkpoint), "--size", size], capsys)
    assert code == 4
    assert "multiple of 16" in message


def test_a_failed_receipt_is_exit_code_10(
    checkpoint: Path, known_graph: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict: Any = parity.Tolerance(max_difference=-1, min_mask_iou=0.999)
    monkeypatch.setitem(parity.TOLERANCES, "f32", strict)
    code, message = failed(["export", str(checkpoint)], capsys)
    assert code == 10
    assert "FAILED" in message
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best.safetensors"]


def test_an_output_that_cannot_be_written_is_exit_code_6(
    checkpoint: Path, known_graph: bytes, notes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["export", str(checkpoint), "-o", str(notes_file / "x.onnx")], capsys)
    assert code == 6
    assert str(notes_file / "x.onnx") in message
