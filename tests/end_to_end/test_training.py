"""How `petseg train` exits, in a separate process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

#: The validation photo of these 24, and one to train on.
VALIDATION, TRAINING = "pet_12", "pet_03"
OPTIONS = ["--width", "2", "--size", "32", "--batch", "4", "--device", "cpu", "--set", "amp=fp32"]


def words(root: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--data", str(root), "--output", str(output), *OPTIONS, *more]


@pytest.fixture
def broken(oxford_copy: Path) -> Path:
    for name in (VALIDATION, TRAINING):
        photo = oxford_copy / "images" / f"{name}.jpg"
        photo.write_bytes(photo.read_bytes()[:300])
    return oxford_copy


SPLIT = ["--set", "data.val_fraction=0.1", "--epochs", "1", "--json"]


@pytest.mark.parametrize("quiet", [False, True])
def test_skipped_photos_are_named_and_exit_as_partial(broken: Path, tmp_path: Path, forks: Any, quiet: bool) -> None:
    more = ["--set", "data.on_bad=skip", *(["-q"] if quiet else [])]
    done = forks(*words(broken, tmp_path / "run", *SPLIT, *more))
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["best"]["skipped"] == 2
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith("excluded: ")]
    assert [name for line in told for name in (VALIDATION, TRAINING) if f"{name}.jpg" in line] == [VALIDATION, TRAINING]
    assert all("petseg data check" in line for line in told), "broken into several lines"
    assert (lines == told) is quiet


def test_unreadable_photos_stop_a_run_without_the_skip_option(broken: Path, tmp_path: Path, forks: Any) -> None:
    stopped = forks(*words(broken, tmp_path / "stopped", *SPLIT))
    assert stopped.returncode == 8, stopped.stderr


def test_a_signal_sets_the_exit_code(oxford_root: Path, tmp_path: Path) -> None:
    """Ctrl-C is tested in `tests/petseg/test_commands.py`."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "petseg.cli", *words(oxford_root, output, "--epochs", "1000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (output / "log.csv").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 129, err
    assert err.splitlines()[-1] == "petseg: interrupted"
    assert not out
