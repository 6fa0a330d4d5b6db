"""The real command line, in processes in which PyTorch is already imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FORKS = Path(__file__).with_name("forks.py")


class Forks:
    """Runs `petseg` in processes that are forked from one that has imported PyTorch: see `forks.py`."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.server = server
        self.out, self.err = folder / "out", folder / "err"

    def __call__(self, *args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = list(map(str, args))
        request = {"args": words, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ)}
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps({**request, "out": str(self.out), "err": str(self.err)}) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(words, code, self.out.read_text("utf-8"), self.err.read_text("utf-8"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    # A separate session, so that its forks are killed with it, even if a test has timed out. -P keeps the script's
    # folder out of sys.path.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-P", str(FORKS)]
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as server:
        try:
            yield Forks(server, tmp_path_factory.mktemp("forks"))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
