"""`python -m benchmarks`: every command is found under its name, and imported alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_is_found_under_its_name() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        found = main.get_command(context, name)
        assert found is not None
        assert found.name == name
    assert main.get_command(context, "another") is None


def test_a_command_does_not_import_what_others_need() -> None:
    """A machine that is lent may lack PyAV, for one."""
    code = "import sys; sys.argv[1:] = ['training', '--help']; sys.modules['av'] = None; import runpy; "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "petseg train" in done.stdout
