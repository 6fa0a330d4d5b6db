"""`python -m benchmarks`: every command is found under its name, and imported alone."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_is_found_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    group = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"), run_name="imported")["main"]  # not in sys.modules
    context = click.Context(group)
    for name in group.list_commands(context):
        assert group.get_command(context, name).name == name
    assert group.get_command(context, "another") is None


def test_a_command_does_not_import_what_others_need() -> None:
    """A machine that is lent may lack PyAV, for one."""
    code = "import sys; sys.argv[1:] = ['training', '--help']; sys.modules['av'] = None; import runpy; "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "petseg train" in done.stdout
