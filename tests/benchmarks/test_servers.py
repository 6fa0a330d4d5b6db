"""Servers of the soak and of the tests of live sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.servers import Server


def test_a_server_that_is_not_ready_is_not_left_running(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('no', flush=True); time.sleep(60)"
    )
    with pytest.raises(AssertionError, match="did not start: 'no"):
        Server(sys.executable, "-c", code, tmp_path / "pid", ready="ready")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
