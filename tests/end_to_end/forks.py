"""A process that has PyTorch imported, and runs each `petseg` that it is asked for in a fork of itself.

Importing PyTorch, torchvision and the exporter takes longer than most of what tests then do with them. In all else a
fork is a process of its own: folder, environment, streams, exit code, and what is done when Python ends. That a command
imports what it needs is seen in `tests/export/test_cli.py` and `tests/petseg/test_commands.py`.

Each line on stdin is a JSON object with the arguments of :func:`run`; the answer to it is a line with the exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys

HEAVY = ("petseg.train", "petseg_export.build", "onnxscript", "torch._dynamo", "torch.utils.tensorboard")


def run(args: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """``petseg ARGS`` in a folder, its output in two files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate((out, err), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    atexit.register(gc.unfreeze)  # or what cannot be freed at the end would be told on stderr
    sys.argv = ["petseg", *args]
    importlib.import_module("petseg.cli").main()


def serve() -> None:
    """Answer, until stdin ends."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or each fork would look through all of it again and again
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
