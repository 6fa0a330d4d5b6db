"""Helpers for tests of several folders that run the command line as a process and look at its files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from petseg.cli import run
from petseg_runtime import sample_photos
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.registry import ENGINES
from petseg_runtime.journal import JOURNAL
from petseg_runtime.parity import load_proof, proof_of

CHELSEA = next(path for path in sample_photos() if path.name == "chelsea.jpg")


def petseg(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the real command line in a separate process; it must never show a traceback."""
    command = [sys.executable, "-m", "petseg.cli", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=200, env={**os.environ, **(env or {})}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def shown_on(terminal: int) -> bytes:
    """Returns everything written to a terminal until its other end is closed."""
    seen = b""
    with contextlib.suppress(OSError):  # how Linux signals the end
        while part := os.read(terminal, 65536):
            seen += part
    os.close(terminal)
    return seen


def parts(folder: Path) -> list[Path]:
    """Returns the files that an interrupted write would leave behind."""
    hidden = (path for path in folder.rglob("*") if ".part" in path.name or path.name.startswith("."))
    return [path for path in hidden if path.name != JOURNAL]


def uninstall(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an engine look as if it were not installed."""
    monkeypatch.setitem(sys.modules, ENGINES[engine].module, None)
    monkeypatch.delitem(sys.modules, ENGINES[engine].loader.partition(":")[0], raising=False)


#: For tests that count lines: other engines may print one more, for the precision that they choose. And for processes
#: in which the engine does not matter: OpenVINO takes twice as long to start.
IN_ONNXRUNTIME = ["--backend", "onnxruntime"]


def tampered(artifact: Artifact) -> Path:
    """Changes the parity record."""
    path = proof_of(artifact.path)
    proof = load_proof(path, artifact.spec, artifact.provenance["checkpoint_sha256"])
    path.write_bytes(dataclasses.replace(proof, expected=255 - proof.expected).to_bytes())
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failed(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns exit code and message of a command that must fail, with nothing on stdout and no traceback."""
    code = run(args)
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    return code, err
