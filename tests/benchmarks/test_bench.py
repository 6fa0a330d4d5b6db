"""``make bench`` runs every step even if others fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["latency", "throughput", "video", "scaling", "training", "accuracy", "peers", "report"]


def made(tmp_path: Path, fails: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``make bench`` with a Python and a petseg that only log their arguments."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$3" in {fails}) exit 3;; esac\n')
    (binaries / "petseg").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntouch "$4"\n')
    for program in binaries.iterdir():
        program.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()  # newer than pyproject.toml: nothing is installed
    command = ["make", "-C", str(ROOT), "bench", f"DEV={tmp_path / 'venv'}", "DATA=photos", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("fails", "code"), [("nothing", 0), ("throughput|report", 2)])
def test_every_step_runs_and_the_failed_ones_are_named(tmp_path: Path, fails: str, code: int) -> None:
    done = made(tmp_path, fails)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls[1:]] == STEPS
    assert "--int8" in calls[1]
    assert done.returncode == code, done.stderr
    assert ("FAILED: throughput report" in done.stderr) == bool(code)


def test_the_pages_name_every_measurement_that_make_bench_omits() -> None:
    own = {"compare", "embedded", "gpu-check", "pet-free"}  # has no table, or is called by another command
    left_out = COMMANDS.keys() - own - set(STEPS)
    (sentence,) = re.findall(r"Not in it, [^.]*\.", (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    assert set(re.findall(r"`([^`]+)`", sentence)) == left_out
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    after_a_model = left_out - {"budget", "rival"}  # these two train other networks
    assert after_a_model <= set(re.findall(r"^    python -m benchmarks ([\w-]+)", page, re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_records_of_another_machine_do_not_change_the_pages(tmp_path: Path) -> None:
    done = made(tmp_path, "nothing", "RESULTS=there")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls[1:]] == STEPS[:-1]
    assert done.returncode == 0, done.stderr
    assert "compare benchmarks/results there" in done.stdout
