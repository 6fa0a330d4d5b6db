"""A server process that has imported PyTorch, and runs each requested `petseg` command in a fork of itself.

Importing PyTorch, torchvision and the exporter takes longer than most of what tests then do with them. In all other
respects a fork is a separate process, with its folder, environment, streams, exit code and exit handlers; only its
objects are not freed at the end, which takes seconds. That each command imports what it needs is tested in
`tests/export/test_cli.py` and `tests/petseg/test_commands.py`; the former also shows that an export ends silently.

Each line on stdin is a JSON object with the arguments of :func:`run`; the response is a line with the exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import threading

HEAVY = ("petseg.train", "petseg_export.build", "onnxscript", "torch._dynamo", "torch.utils.tensorboard")


def run(args: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Run ``petseg ARGS`` in a folder, with stdout and stderr redirected to two files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate((out, err), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["petseg", *args]
    try:
        importlib.import_module("petseg.cli").main()
    except SystemExit as end:
        # What Python does at exit, until it frees all modules.
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code)


def serve() -> None:
    """Serve requests until stdin ends."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # otherwise the garbage collector would scan all of it in each fork
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
