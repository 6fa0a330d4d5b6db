"""Run a command; print its time and peak memory as one line of JSON on stdout.

    python -I -S watch.py COMMAND ARGUMENT...

This is a separate, small process because on Linux, a child's peak memory includes its parent's memory at the moment of
the fork, and the benchmark process is larger than what it measures. The command's output goes to stderr. The exit code
is the command's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    """Run the command and print its time and memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    taken = {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 4),
        "memory_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
    }
    print(json.dumps(taken))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
