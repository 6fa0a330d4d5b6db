"""All commands: help, wrong usage, standard output and standard error that cannot be written to, and signals."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path

import pytest

from command_line import IN_ONNXRUNTIME, files, petseg
from petseg.cli import COMMANDS, run
from petseg_runtime import __version__, default_model
from petseg_runtime.engines.base import DEVICES
from petseg_runtime.extras import install
from petseg_runtime.files import replacing
from petseg_runtime.signals import terminable


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["infer"],
        ["infer", "--nonsense", "cat.jpg"],
        ["infer", "cat.jpg", "--as", "painting"],
        ["infer", "cat.jpg", "--threads", "0"],
        ["infer", "cat.jpg", "--threads", "two"],
        ["info", "one.onnx", "two.onnx"],
        ["verify", "one.onnx", "two.onnx"],
        ["verify", "--threads", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_is_explained_on_stderr(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: petseg" in err


@pytest.mark.parametrize(
    "args",
    [
        ["infer", ""],
        ["infer", "cat.jpg", ""],
        *(["infer", "cat.jpg", option, ""] for option in ("--output", "--model", "--background")),
        ["info", ""],
        ["benchmark", ""],
        ["verify", "--output", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_exits_with_2(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("it is empty; is a variable not set?\n")
    assert files(photo.parent) == {"cat.jpg"}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "args",
    [
        *(["infer", "a.mp4", f"--{name}"] for name in ("start", "smooth", "segment", "stall", "give-up")),
        *(["infer", "a.jpg", f"--{name}"] for name in ("threshold", "cutout-threshold", "min-area")),
        ["benchmark", "--seconds"],
        ["evaluate", "a.onnx", "--data", ".", "--threshold"],
        ["export", "a.safetensors", "--int8-budget"],
    ],
    ids=" ".join,
)
def test_an_invalid_number_exits_with_2(args: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*args, value]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Invalid value for '{args[-1]}': {value} is not" in err


@pytest.mark.parametrize(
    "args",
    [["infer", "{0}"], ["export", "{0}", "-o", "{0}.onnx"], ["train", "--data", "{0}", "--output", "{0}.run"]],
    ids=itemgetter(0),
)
def test_a_deleted_working_folder_is_a_one_line_error(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run([arg.format(photo) for arg in args]) == 1
    assert capsys.readouterr() == ("", "petseg: the current folder was deleted; change to another (cd)\n")


@pytest.mark.parametrize("name", ["a\n" * 200, b"a\n" * 200], ids=type)
def test_a_name_that_is_too_long_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str | bytes
) -> None:
    monkeypatch.setattr("petseg.cli.petseg.main", lambda **_: os.stat(name))  # noqa: PTH116 (Path may hide it)
    assert run(["verify"]) == 1
    assert capsys.readouterr().err == "petseg: " + r"a\n" * 200 + ": no file can have so long a name\n"


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every command raise an error."""

    def main(**_: object) -> None:
        raise error

    monkeypatch.setattr("petseg.cli.petseg.main", main)


NO_THREAD = "no more threads or processes can be started: raise the limit (ulimit -u, or the container's)"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("can't start new thread"), 1, NO_THREAD),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 1, NO_THREAD),
        (OSError(errno.EMFILE, "Too many open files"), 1, "too many open files: raise the limit (ulimit -n)"),
        (OSError(errno.ENFILE, "File table overflow"), 1, "too many open files: raise the limit (ulimit -n)"),
        (MemoryError(), 1, "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "not enough memory"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6, "standard output cannot be written to (Disk quota exceeded)"),
        (OSError(errno.EFBIG, "File too large"), 6, "standard output cannot be written to (File too large)"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"),
            1,
            "no folder for temporary files can be written to; name one in the variable TMPDIR",
        ),
        (
            ImportError("libc10.so: no such file", name="torch._C", path="/p/torch/_C.so"),
            7,
            "/p/torch/_C.so: cannot be imported (libc10.so: no such file)",
        ),
        (ImportError("no such symbol", name="av.logging"), 7, "av.logging: cannot be imported (no such symbol)"),
    ],
    ids=["thread", "process", "files", "table", "memory", "fork", "quota", "size", "temporary", "library", "symbol"],
)
def test_a_limit_of_the_system_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    fail_with(error, monkeypatch)
    assert run(["info"]) == code
    assert capsys.readouterr() == ("", f"petseg: {said}\n")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("info", RuntimeError("a bug")),
        ("info", ImportError("cannot import name", name="petseg.data")),
        ("info", ImportError("cannot import name", name="petseg_runtime.files")),
        ("info", ModuleNotFoundError("No module named 'numpy'", name="numpy")),  # of the plain install
        ("export", ModuleNotFoundError("No module named 'petseg.nothing'", name="petseg.nothing")),
        ("info", OSError(errno.ENOSPC, "No space left on device", "somewhere")),
        ("info", OSError(errno.EBUSY, "Device or resource busy")),
        ("info", BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}: {value}",
)
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, command: str, error: Exception) -> None:
    fail_with(error, monkeypatch)
    with pytest.raises(type(error)):
        run([command])


@pytest.mark.parametrize(
    ("command", "extra"), [("train", "train"), ("evaluate", "train"), ("data", "train"), ("export", "export")]
)
def test_a_missing_package_names_the_extra_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, extra: str
) -> None:
    fail_with(ModuleNotFoundError("No module named 'torch._C'", name="torch._C"), monkeypatch)
    assert run([command, "info"]) == 7
    said = f"`petseg {command}` needs torch._C, which is not installed: {install(extra)}"
    assert capsys.readouterr() == ("", f"petseg: {said}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args", [["--version"], ["info", str(default_model())], ["infer"], ["infer", "--json"]], ids=" ".join
)
def test_a_full_disk_behind_stdout_exits_with_6(
    reds: list[str], tmp_path: Path, args: list[str], unbuffered: str
) -> None:
    if args[0] == "infer":
        args = [*reds, str(tmp_path / "out"), *IN_ONNXRUNTIME, *args[1:]]
    command = [sys.executable, "-m", "petseg.cli", *args]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, timeout=100)
    assert done.stderr == b"petseg: standard output cannot be written to (No space left on device)\n"
    assert done.returncode == 6


@pytest.mark.parametrize(
    ("args", "stderr"),
    [("--help", ""), (f"info {default_model()}", ""), ("info", "2>&-")],
    ids=["help", "info", "no stderr"],
)
def test_a_pipe_closed_from_the_start_exits_with_1_and_says_nothing(args: str, stderr: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    shell = ["sh", "-c", f'exec "$0" -m petseg.cli {args} {stderr}', sys.executable]
    try:
        done = subprocess.run(shell, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("stderr", ["full", "reader gone", "closed"])
@pytest.mark.parametrize(("args", "code"), [(["info", "none.onnx"], 4), (["info", "--nonsense"], 2)])
def test_an_unwritable_stderr_does_not_change_the_exit_code(args: list[str], code: int, stderr: str) -> None:
    command = [sys.executable, "-m", "petseg.cli", *args]
    if stderr == "closed":
        command = ["sh", "-c", 'exec "$0" "$@" 2>&-', *command]
        assert subprocess.run(command, timeout=100).returncode == code
        return
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone, Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stderr=full if stderr == "full" else gone, timeout=100)
    assert done.returncode == code


class Gone(io.StringIO):
    """Standard error whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_signal_keeps_its_exit_code_with_an_unwritable_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    @terminable()
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143


def test_ctrl_c_keeps_its_exit_code_with_an_unwritable_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.cache.entries", lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "stderr", Gone())
    assert run(["cache"]) == 130


def test_output_to_a_closed_terminal_exits_as_after_sighup(tmp_path: Path) -> None:
    """The last output of a run may come before the signal does."""
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    os.close(mine)  # it is not the controlling terminal of the process, so no signal comes
    command = [sys.executable, "-m", "petseg.cli", "cache"]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)}
    ) as run_:
        os.close(theirs)
        assert run_.stderr is not None
        said = run_.stderr.read()
    assert (run_.returncode, said) == (129, b"")


@pytest.mark.parametrize(("number", "code", "said"), [(15, 143, "terminated"), (1, 129, "hung up")])
def test_a_repeated_signal_does_not_interrupt_the_cleanup(
    number: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`timeout` sends SIGTERM twice; the shell and the system may both send SIGHUP."""
    before, cleaned_up = signal.getsignal(number), []

    @terminable()
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleaned_up.append(True)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == code
    assert cleaned_up
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"petseg: {said}\n"


@pytest.mark.parametrize(("number", "code"), [(15, 143), (1, 129)])
def test_a_signal_leaves_no_partial_files_in_any_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """A scheduler or a closed laptop may end an export, an evaluation or a verification with a signal, which by default
    would end Python at once.
    """
    path = tmp_path / "model.onnx"

    def exported() -> None:
        with replacing(path) as beside:
            beside.write_bytes(b"half")
            signal.raise_signal(number)

    monkeypatch.setattr("petseg.cli.petseg.main", lambda **_: exported())
    with pytest.raises(SystemExit) as end:
        run(["export"])
    assert end.value.code == code
    assert list(tmp_path.iterdir()) == []


#: A probe that writes its process ID, and hangs.
HANGS = """
import sys
from petseg.cli import main
from petseg_runtime import doctor

probe = "import os, time; open({path!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep(600)"
doctor.probe = lambda *words, **options: doctor.ask([sys.executable, "-c", probe], 600)
main()
"""


@pytest.mark.parametrize("command", ["doctor", "benchmark"])
def test_sigterm_terminates_child_processes(tmp_path: Path, command: str) -> None:
    """The child process has a separate session, so the signal would not reach it."""
    path = tmp_path / "pid"
    program = HANGS.format(path=str(path))
    with subprocess.Popen([sys.executable, "-c", program, command], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    probe = int(path.read_text())
    gone = not Path(f"/proc/{probe}").exists()
    if not gone:
        os.kill(probe, signal.SIGKILL)
    assert gone
    assert (process.returncode, err) == (143, "petseg: terminated\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_exit_code(flag: str) -> None:
    done = petseg(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP" in " ".join(done.stdout.split())


def test_help_names_every_form_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", "--help"]) == 0
    text = capsys.readouterr().out
    for kind in DEVICES:
        form = kind if kind == "cpu" else f"{kind}[:N]"
        assert f" {form}" in text, form


@pytest.mark.parametrize("command", ["infer", "info", "verify"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Usage: petseg {command}" in capsys.readouterr().out


def test_version_is_the_package_version() -> None:
    done = petseg("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


@pytest.mark.parametrize("command", [["info"], ["infer", "cat.jpg", "--model"], ["verify"]], ids=" ".join)
def test_a_fatal_error_escapes_file_names(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "no\x1b]0;title\x07\nmodel.onnx"]) == 4
    assert capsys.readouterr().err.startswith("petseg: no\\x1b]0;title\\x07\\nmodel.onnx: ")
