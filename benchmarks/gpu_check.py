"""``make gpu-check``: everything that only a machine with an NVIDIA GPU can tell, in one file to send back.

    python -m benchmarks.gpu_check

petseg's roads over NVIDIA's GPUs were built without one. What this writes, gpu-check.json, says what became of them:
the x-ray of the machine, every test that needs a GPU or TensorRT, every engine's masks against the checkpoint's,
every engine's times, alone and in turns with PyTorch's (the record of `python -m benchmarks latency`), and where the
time of a video goes. Names of people, machines and folders are left out.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from benchmarks.records import git
from petseg_runtime import doctor
from petseg_runtime.engines.registry import ENGINES
from petseg_runtime.errors import EngineError
from petseg_runtime.files import write_atomic

ROOT: Final = Path(__file__).parent.parent
SCHEMA_VERSION: Final = 1
BATCHES: Final = (1, 8, 32)
WITHOUT_GRAPHS: Final = "without CUDA graphs"
#: Drawn by FFmpeg, so that nothing has to be brought along.
CLIP: Final = "lavfi:testsrc2=size=1280x720:rate=30"
#: Rounds of the latency benchmark, whose engines TensorRT has to build first.
ROUNDS: Final = 3
#: Of a program of ours: a build of TensorRT is minutes, all tests are more. A hang ends here.
DEADLINE: Final = 3600

# A path of at least two parts that is no part of a longer word, or of an address.
_PATH: Final = re.compile(r"(?:(?<=file://)|(?<![\w/.)]))/(?!/)(?:[^\s/:'\"(),;]+/)+([^\s/:'\"(),;]*)")


@click.command("gpu-check")
@click.option("--output", type=click.Path(path_type=Path), default=Path("gpu-check.json"), show_default=True)
def gpu_check(output: Path) -> None:
    """Run every GPU test and benchmark; OUTPUT is the record to send back.

    Exit code 0: all passed; 1: something did not, and the record says what; 5: no NVIDIA GPU, and no record.
    """
    gpus, problem = doctor.read_gpus()
    if not gpus:
        why = problem or "no driver, or none that this process may use"
        click.echo(f"this machine shows no NVIDIA GPU ({why}): nothing was checked, {output} was not written", err=True)
        sys.exit(EngineError.exit_code)
    record = collect(lambda part: write_atomic(output, (json.dumps(without_names(part), indent=1) + "\n").encode()))
    for line in summary(record):
        click.echo(line)
    click.echo(f"the record is {output}; please send it back")
    sys.exit(1 if record["failures"] else 0)


def collect(keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, and ``failures``: what did not pass, a line each.

    Args:
        keep: Given the record when each part is done: one that was interrupted has no ``failures``.
    """
    say("the x-ray of this machine")
    found = doctor.x_ray(say)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD").strip() or None,
        "doctor": {**dataclasses.asdict(found), "cache": ""},
    }
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: tests(["-m", "gpu or tensorrt"]),
        "parity": parity,
        "benchmarks": speeds,
        "latency": latency,
        "video": videos,
    }
    for name, part in parts.items():
        keep(record)
        record[name] = part()
    record["failures"] = failures(record)
    keep(record)
    return record


def parity() -> dict[str, Any]:
    """Each engine's masks against those of the checkpoint."""
    return {name: command("verify", "--json", "--backend", name) for name in ENGINES}


def speeds() -> dict[str, Any]:
    """`petseg benchmark` with each size of batch, and TensorRT without CUDA graphs."""
    engines = ("--backend", "tensorrt", "--backend", "tensorrt-rtx")
    return {
        **{f"batch {size}": command("benchmark", "--json", "--batch", str(size)) for size in BATCHES},
        WITHOUT_GRAPHS: command("benchmark", "--json", *engines, "--no-cuda-graph"),
    }


def videos() -> dict[str, Any]:
    """A video to lines of JSON, and to an overlay."""
    return {kind: video(kind) for kind in ("lines", "overlay")}


def tests(selection: Sequence[str]) -> list[dict[str, Any]]:
    """Run pytest on a selection, each file in a process of its own: a crash on a GPU ends but one of them.

    Returns:
        For each test ``name``, ``outcome`` (passed, failed, error or skipped), ``seconds`` and ``why``; for a file that
        pytest did not come to the end of, one error with the end of what it printed.
    """
    # Warnings are no failures here: other versions of PyTorch have deprecated other things.
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *selection)
    say("looking for tests")
    collected = ran([*pytest, "--collect-only", "-q"])
    files = sorted({line.partition("::")[0] for line in collected["out"].splitlines() if "::" in line})
    cases = [] if files and not collected["exit_code"] else [_crash("collection", collected)]
    for file in files:
        say(f"testing {file}")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            done = ran([*pytest, "-v", f"--junitxml={report}", file])
            found = [_case(case) for case in ET.parse(report).iter("testcase")] if report.exists() else []
        cases += found or [_crash(file, done)]
    return cases


def _crash(name: str, done: dict[str, Any]) -> dict[str, Any]:
    said = f"exit code {done['exit_code']}\n{done['out'][-3000:]}\n{done['err'][-3000:]}"
    return {"name": name, "outcome": "error", "seconds": 0.0, "why": said}


def _case(case: ET.Element) -> dict[str, Any]:
    found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    outcome = "passed" if found is None else {"failure": "failed"}.get(found.tag, found.tag)
    return {
        "name": f"{case.get('classname')}::{case.get('name')}",
        "outcome": outcome,
        "seconds": float(case.get("time", 0)),
        # The message of a skip is its reason; of a failure, the traceback says more.
        "why": ""
        if found is None
        else found.get("message", "")
        if outcome == "skipped"
        else (found.text or "")[-4000:],
    }


def command(*words: str) -> dict[str, Any]:
    """Run petseg in a process of its own, which may crash.

    Returns:
        ``exit_code``, ``answer`` (its JSON; None if it gave none) and ``said`` (the end of its stderr).
    """
    say(f"petseg {' '.join(words)}")
    done = ran([sys.executable, "-m", "petseg.cli", *words])
    try:
        answer = json.loads(done["out"])
    except ValueError:
        answer = None
    return {"exit_code": done["exit_code"], "answer": answer, "said": done["err"].splitlines()[-10:]}


def latency() -> dict[str, Any]:
    """The model that ships in every engine and in PyTorch, on CPU and GPU, in turns; the answer is that record."""
    say(f"latency, {ROUNDS} rounds")
    # Not by `python -m benchmarks`, which imports what only others need. Without photos, int8 is for its speed only.
    code = "from benchmarks.latency import latency; latency()"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latency.json"
        options = [
            "--no-family",
            "--rounds",
            str(ROUNDS),
            "--data",
            str(Path(folder) / "none"),
            "--output",
            str(output),
        ]
        done = ran([sys.executable, "-c", code, *options])
        answer = json.loads(output.read_text(encoding="utf-8")) if output.exists() else None
    return {"exit_code": done["exit_code"], "answer": answer, "said": done["err"].splitlines()[-10:]}


def video(kind: str) -> dict[str, Any]:
    """A video end to end on the GPU, as fast as it goes; the answer is the event that ends it."""
    say(f"a video, {kind}")
    with tempfile.TemporaryDirectory() as folder:
        words = [CLIP, "--as", kind, "--device", "cuda", "--policy", "block", "--max-frames", "900", "--json"]
        done = ran([sys.executable, "-m", "petseg.cli", "infer", *words, "--output", folder])
    events = [json.loads(line) for line in done["out"].splitlines() if '"event": "video"' in line]
    answer = events[0] if events else None
    return {"exit_code": done["exit_code"], "answer": answer, "said": done["err"].splitlines()[-10:]}


def ran(words: Sequence[str]) -> dict[str, Any]:
    """``exit_code`` (negative: the signal that ended it), ``out`` and ``err`` of a program; a hang is code -9."""
    done = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    with done:
        try:
            out, err = done.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            done.kill()
            out, err = done.communicate()
            err += f"\nended: no end within {DEADLINE} s"
        except BaseException:  # Ctrl-C
            done.kill()
            raise
    return {"exit_code": done.returncode, "out": out, "err": err}


def failures(record: dict[str, Any]) -> list[str]:
    """What did not pass; an engine that is not installed is none, but that none works on the GPU is."""
    checks = [check for check in record["doctor"]["engines"] if check["device"] == "cuda"]
    there = {check["engine"] for check in checks if check["packages"]}
    found = [f"{check['engine']} on cuda: {check['why']}" for check in checks if check["packages"] and check["why"]]
    if not any(check["works"] for check in checks):
        found.append("no engine works on the GPU")
    cases = record["tests"]
    found += [f"{case['name']}: {case['outcome']}" for case in cases if case["outcome"] in ("failed", "error")]
    if not any(case["outcome"] == "passed" for case in cases):
        found.append("no test passed")
    commands = {f"verify in {name}": done for name, done in record["parity"].items() if name in there}
    commands |= {
        f"benchmark, {name}": done
        for name, done in record["benchmarks"].items()
        if name != WITHOUT_GRAPHS or there & {"tensorrt", "tensorrt-rtx"}
    }
    commands |= {"latency": record["latency"]}
    commands |= {f"video as {kind}": done for kind, done in record["video"].items()}
    found += [f"{name}: exit code {done['exit_code']}" for name, done in commands.items() if done["exit_code"]]
    measured = record["latency"]["answer"]
    if measured and not any(row["device"] == "cuda" for row in measured["rows"]):
        found.append("latency: nothing was measured on the GPU")
    return found


def summary(record: dict[str, Any]) -> list[str]:
    """What people want to know of a record."""
    lines = [f"{gpu['name']}, {gpu['driver']}" for gpu in record["doctor"]["gpus"]]
    lines += [
        f"{check['engine']}: {check['precision'] + ', works' if check['works'] else check['why']}"
        for check in record["doctor"]["engines"]
        if check["device"] == "cuda"
    ]
    outcomes = [case["outcome"] for case in record["tests"]]
    lines.append("tests: " + ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(sorted(outcomes))))
    for name, done in record["benchmarks"].items():
        for row in (done["answer"] or {"rows": ()})["rows"]:
            speed = f"{row['latency_ms']['p50']:.2f} ms, {row['photos_per_second']['median']:.0f} photos/s"
            lines.append(f"{name}: {row['name']} on {row['device']}, {row['precision']}: {speed}")
    lines += in_turns(record["latency"]["answer"] or {"rows": (), "networks": ()})
    lines += [
        f"video as {kind}: {done['answer']['rate']:.0f} frames/s"
        for kind, done in record["video"].items()
        if done["answer"]
    ]
    return lines + [f"FAILED {failure}" for failure in record["failures"]]


def in_turns(measured: dict[str, Any]) -> list[str]:
    """A line for each row on the GPU of a record of latency."""
    lines = []
    for group in (measured, *measured["networks"]):
        for row in group["rows"]:
            faster = row["times_faster_than_pytorch"]
            told = f", {faster:.1f} times as fast as PyTorch" if faster else ""
            what = f"{row['name']}, {row['precision']}: {row['median']:.2f} ms{told}"
            lines += [f"in turns, batch {group['batch']}: {what}"] if row["device"] == "cuda" else []
    return lines


def without_names(value: Any) -> Any:
    """JSON values without folders (of a path its last part stays), and without the user's and the machine's name."""
    if isinstance(value, dict):
        return {without_names(key): without_names(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(item) for item in value]
    if not isinstance(value, str):
        return value
    for folder in (ROOT, Path.home()):  # first as they are: their names may hold spaces
        value = value.replace(f"{folder}/", ".../") if len(folder.parts) > 1 else value
    text = _PATH.sub(r".../\1", value)
    for name, what in ((socket.gethostname(), "HOST"), (_user(), "USER")):
        text = re.sub(rf"\b{re.escape(name)}\b", what, text) if name else text
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return os.environ.get("USER", "")


def say(what: str) -> None:
    """Progress, for people."""
    click.echo(f"gpu-check: {what}", err=True)


if __name__ == "__main__":
    gpu_check()
