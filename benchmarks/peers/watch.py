"""Run a command; say, as one line of JSON on stdout, how long it took and the most memory that it held.

    python -I -S watch.py COMMAND ARGUMENT...

A process of its own, and a small one: Linux counts into a process's largest memory that of the process which started
it, as it was at that moment, and the benchmark itself holds more than what it measures. What the command prints goes
to stderr. The exit code is the command's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    """Run it and print what it took."""
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
