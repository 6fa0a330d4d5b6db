"""``petseg infer`` on terminals and in pipes: standard input and output, readers that go away, Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command_line import CHELSEA, IN_ONNXRUNTIME, files, parts, shown_on
from petseg.cli import run
from petseg_runtime.journal import JOURNAL

# ----------------------------------------------------------------------------------------------- terminals


def on_a_terminal(*command: str) -> str:
    """The lines that a successful command shows on a terminal, without colours."""
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    call = [sys.executable, "-m", "petseg.cli", *command, *IN_ONNXRUNTIME]
    running = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    said = shown_on(mine)
    assert running.wait(60) == 0
    return re.sub(r"[\r\n]+", "\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()))


def test_on_a_terminal_lines_appear_above_the_bar(reds: list[str], tmp_path: Path) -> None:
    """Nothing of the progress bar precedes them on their line."""
    names = ["[red]0.png", *(f"{number}.png" for number in range(1, 5))]
    (tmp_path / "photos" / "0.png").rename(tmp_path / "photos" / names[0])  # as markup, its brackets would vanish
    text = on_a_terminal(*reds, str(tmp_path / "out"))
    for name in names:
        source, result = tmp_path / "photos" / name, tmp_path / "out" / name
        assert f"\n{source} -> {result}  " in f"\n{text}"
    assert "segmenting" in text
    assert on_a_terminal(*reds, str(tmp_path / "out"), "-q") == ""


def test_with_a_bar_every_line_still_goes_to_stdout(reds: list[str], tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "petseg.cli", *reds, str(tmp_path / "out"), *IN_ONNXRUNTIME]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as running:
        os.close(theirs)
        seen = shown_on(mine)
        assert running.stdout is not None
        assert running.stdout.read().count(b" -> ") == 5
    assert b"segmenting" in seen
    assert b" -> " not in seen


def test_a_resumed_runs_bar_counts_only_the_remaining_photos(reds: list[str], tmp_path: Path) -> None:
    assert run([*reds, str(tmp_path / "out"), *IN_ONNXRUNTIME]) == 0
    for number in (1, 3):
        (tmp_path / "out" / f"{number}.png").unlink()
    text = on_a_terminal(*reds, str(tmp_path / "out"), "--resume")
    assert re.search(r"segmenting .*100%", text), text
    (tmp_path / "out" / "1.png").unlink()
    assert "segmenting" not in on_a_terminal(*reds, str(tmp_path / "out"), "--resume"), "no bar for one photo"


def test_a_closed_stdout_with_stderr_on_a_terminal(reds: list[str], tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "petseg.cli", *reds, str(tmp_path / "out"), *IN_ONNXRUNTIME]
    running = subprocess.Popen(["sh", "-c", 'exec "$@" >&-', "sh", *command], stdin=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):
        while os.read(mine, 65536):
            pass
    os.close(mine)
    assert running.wait(60) == 0
    assert len(files(tmp_path / "out")) == 6


# ---------------------------------------------------------------------------------- standard input and output


def piped(data: bytes, *args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The real command line, with bytes on standard input."""
    command = [sys.executable, "-m", "petseg.cli", *map(str, args), *IN_ONNXRUNTIME]
    done = subprocess.run(command, input=data, timeout=100, **({"capture_output": True} | options))
    assert b"Traceback" not in (done.stderr or b"")
    return done


def test_a_photo_on_stdin_gives_a_picture_on_stdout(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photos" / "0.png"
    done = piped(photo.read_bytes(), "infer", "-", *reds[2:4], "--as", "mask", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, b"")
    assert run(["infer", str(photo), *reds[2:], str(tmp_path / "out"), "--as", "mask"]) == 0
    assert done.stdout == (tmp_path / "out" / "0.png").read_bytes()


@pytest.mark.parametrize(("data", "why"), [(b"no photo", b"not an image"), (b"", b"empty (0 bytes)")])
def test_an_invalid_photo_on_stdin_exits_with_1_and_empty_stdout(reds: list[str], data: bytes, why: bytes) -> None:
    done = piped(data, "infer", "-", *reds[2:4])
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"petseg: standard input: " + why)
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_behind_stdout_exits_with_6(reds: list[str], tmp_path: Path) -> None:
    data = (tmp_path / "photos" / "0.png").read_bytes()
    with Path("/dev/full").open("wb") as full:
        done = piped(data, "infer", "-", *reds[2:4], capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr == b"petseg: standard output cannot be written to (No space left on device)\n"


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        ("<&-", 1, "petseg: standard input (-) is closed; pipe something into it, or name a file\n"),
        (">&-", 6, "petseg: standard output is closed; give a folder with --output\n"),
    ],
)
def test_a_closed_standard_stream_is_a_one_line_error(closed: str, code: int, said: str) -> None:
    shell = ["sh", "-c", f'exec "$0" -m petseg.cli infer - {closed}', sys.executable]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_closed_stderr_does_not_stop_the_run(reds: list[str], tmp_path: Path) -> None:
    """As in some services: without standard error there is no progress bar, and nothing else changes."""
    command = [sys.executable, "-m", "petseg.cli", *reds, str(tmp_path / "out"), *IN_ONNXRUNTIME]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stdout.count(" -> ")) == (0, 5)
    assert len(files(tmp_path / "out")) == 6


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_files_never_get_the_descriptors_of_closed_standard_streams(tmp_path: Path, closed: str) -> None:
    """A C library that prints to standard error would write into them."""
    program = (
        "import os, sys\nfrom petseg import cli\n"
        "cli.petseg.main = lambda **_: os.write(file := os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b'%d' % file)\n"
        "cli.main([])"
    )
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    subprocess.run(shell, timeout=100)
    assert int((tmp_path / "file").read_text()) > 2


def test_standard_streams_that_do_not_block_are_made_to() -> None:
    """Another program that shares them may have set them so, and then, reads and writes are incomplete."""
    program = (
        "import os\nfrom petseg import cli\n"
        "cli.petseg.main = lambda **_: print(*map(os.get_blocking, range(3)))\ncli.main([])"
    )
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as out:
        with os.fdopen(writer, "wb") as theirs:
            for end in (out, theirs):
                os.set_blocking(end.fileno(), False)
            subprocess.run([sys.executable, "-c", program], stdin=out, stdout=theirs, stderr=theirs, timeout=100)
        assert out.read() == b"True True True\n"


class Stdin:
    """A replacement for standard input."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_stdin_with_an_output_folder_writes_a_file(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (tmp_path / "photos" / "0.png").read_bytes()
    for options, written in (
        ([], {"stdin.png"}),
        (["--json"], {"stdin.png"}),
        (["--as", "mask", "--resume"], {"stdin.png", JOURNAL}),
        (["--as", "coco-rle"], {"annotations.json"}),
    ):
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        out = tmp_path / "-".join(["out", *options])
        assert run(["infer", "-", *reds[2:], str(out), *options]) == 0
        assert files(out) == written
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    both = ["infer", str(tmp_path / "photos" / "1.png"), "-", *reds[2:], str(tmp_path / "both")]
    assert run(both) == 0
    assert files(tmp_path / "both") == {JOURNAL, "1.png", "stdin.png"}


@pytest.mark.parametrize("options", [["--json"], ["--resume"], ["--as", "coco-rle"]], ids=" ".join)
def test_options_that_need_a_folder_exit_with_2_on_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # standard input is not even read
    assert run(["infer", "-", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "give a folder with --output" in err


def test_a_file_named_like_stdin_is_read(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "-", "png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    assert (
        run(["infer", "./-", "--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path), "--output", "out"]) == 0
    )
    assert files(tmp_path / "out") == {"-.png"}


def test_stdin_given_twice_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", "-", "-", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "petseg: standard input (-) can be given only once\n"
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- broken pipes and Ctrl-C


def test_a_broken_pipe_gives_no_traceback_and_leaves_no_partial_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(100):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    words = ["infer", str(folder), "--output", str(tmp_path / "out"), *IN_ONNXRUNTIME]
    command = [sys.executable, "-m", "petseg.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "% pet" in process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=100)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert len(list((tmp_path / "out").iterdir())) < 50  # it stopped early
    assert parts(tmp_path) == []


def test_ctrl_c_exits_with_130_and_leaves_only_complete_results(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    # A shell that starts this test in the background makes its children ignore Ctrl-C.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import petseg.cli as c; c.main()"
    )
    words = ["infer", str(folder), "--as", "overlay", "--output", str(out), *IN_ONNXRUNTIME]
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert "% pet" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip() == "petseg: interrupted"
    assert parts(tmp_path) == []
    results = sorted(out.glob("*.jpg"))
    assert 3 <= len(results) < 300
    for result in results:
        with Image.open(result) as picture:
            picture.load()


def test_a_closed_terminal_leaves_only_complete_results(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    mine, theirs = pty.openpty()
    # The terminal becomes the controlling terminal of the process, as after a login.
    program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import petseg.cli as c; c.main()"
    words = ["infer", str(folder), "--as", "overlay", "--output", str(out), *IN_ONNXRUNTIME]
    command = [sys.executable, "-c", program, *words]
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen(command, start_new_session=True, **terminal) as process:
        os.close(theirs)
        said = b""
        while said.count(b"% pet") < 3:
            said += os.read(mine, 4096)
        os.close(mine)
        assert process.wait(100) == 129
    assert parts(tmp_path) == []
    assert 3 <= len(list(out.glob("*.jpg"))) < 300


#: Raises a signal in the main thread when `Condition.wait` has just released its lock.
UNLUCKY = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
number = int(sys.argv.pop(1))

def returning(frame, event, value):
    if event == "return":
        sys.settrace(None)
        signal.raise_signal(number)
    return returning

released = threading.Condition._release_save.__code__
sys.settrace(lambda frame, event, value: returning if frame.f_code is released else None)
import petseg.cli
petseg.cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_at_an_unlucky_moment_ends_the_run_as_any_other(
    reds: list[str], tmp_path: Path, number: int, code: int, said: str
) -> None:
    """While a thread is started, for example."""
    command = [sys.executable, "-c", UNLUCKY, str(number), *reds, str(tmp_path / "out"), *IN_ONNXRUNTIME]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.strip()) == (code, f"petseg: {said}")


def test_a_signal_while_the_folder_is_tried_leaves_nothing_there(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first result, a file is written there, renamed and removed."""
    replace = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        done = replace(path, target)
        signal.raise_signal(signal.SIGTERM)
        return done

    monkeypatch.setattr(Path, "replace", renamed)
    with pytest.raises(SystemExit) as end:
        run([*reds, str(tmp_path / "out"), *IN_ONNXRUNTIME])
    assert end.value.code == 143
    assert parts(tmp_path) == []


class Bar:
    """A progress bar that a signal interrupts in one of its calls."""

    def __init__(self, unlucky: str) -> None:
        self.unlucky, self.calls = unlucky, list[str]()

    def add_task(self, what: str, total: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            if name == self.unlucky:
                signal.raise_signal(signal.SIGTERM)
            self.calls.append(name)

        return call


@pytest.mark.parametrize("unlucky", ["start", "advance"])
def test_a_signal_in_the_progress_bar_ends_the_run_as_any_other(
    reds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unlucky: str,
) -> None:
    """Rich's bar cannot be stopped if it has started by half, and may forget to show the cursor again."""
    shown = Bar(unlucky)
    monkeypatch.setattr("petseg_runtime.cli.infer.watched", lambda: True)
    monkeypatch.setattr("petseg_runtime.cli.infer.bar", lambda: shown)
    with pytest.raises(SystemExit) as end:
        run([*reds, str(tmp_path / "out"), *IN_ONNXRUNTIME])
    assert end.value.code == 143
    assert shown.calls[0] == "start"
    assert shown.calls[-1] == "stop"
    assert capsys.readouterr().err == "\x1b[?25hpetseg: terminated\n"


def test_ctrl_c_after_the_command_gives_no_traceback(tmp_path: Path) -> None:
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import petseg.cli as c; "
        "c.discard_unwritten = lambda: signal.raise_signal(signal.SIGINT); c.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
