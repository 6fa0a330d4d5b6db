"""`python -m benchmarks`: every command is found under its name, and imported alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

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
    """A machine that we are lent may lack PyAV, for example."""
    code = "import sys; sys.argv[1:] = ['training', '--help']; sys.modules['av'] = None; import runpy; "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "petseg train" in done.stdout


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("flicker", "--photos"),
        ("latency", "--rounds"),
        ("latency", "--threads"),
        ("reduced", "--photos"),
        ("reduced", "--timed"),
        ("scaling", "--rounds"),
        ("scaling", "--clip-rounds"),
        ("video-road", "--photos"),
        ("video-road", "--timed"),
    ],
)
def test_zero_is_rejected_immediately(name: str, option: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    with pytest.raises(click.BadParameter, match="0 is not in the range x>=1"):
        command.make_context(name, [option, "0"])
