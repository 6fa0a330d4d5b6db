"""Live sources against real servers on loopback: the run survives when they break, stall, and change."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

import av
import pytest
from av.container import core

from benchmarks.servers import (
    Relay,
    Run,
    free_port,
    hls_server,
    http_sender,
    lacking,
    motion_jpeg_sender,
    rtmp_sender,
    rtmp_server,
    rtsp_server,
    udp_sender,
    until,
)
from petseg.cli import run
from petseg_runtime import Segmenter
from petseg_runtime.cli import infer_video
from petseg_runtime.errors import SilentVideo, UnreadableVideo
from petseg_runtime.sources import Origin, redacted, stream_origin
from petseg_runtime.video import live
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.live import LiveSource, StateChange
from petseg_runtime.video.reader import VideoReader
from petseg_runtime.video.sound import Sound
from petseg_runtime.video.stream import POLICIES

SECRET = "s3cret"

#: A camera that every machine has.
CAMERA = "lavfi:testsrc2=size=160x120:rate=25,realtime"


def needs(*kinds: str) -> Any:
    """Mark a test that needs servers of these kinds; see :func:`benchmarks.servers.lacking`."""
    reason = lacking(*kinds)
    return lambda test: pytest.mark.servers(pytest.mark.skipif(reason is not None, reason=reason or "")(test))


@pytest.fixture
def model(tmp_path: Path, toy: Any) -> Path:
    path: Path = toy(tmp_path / "toy.onnx").path
    return path


def frames_in(path: Path | str) -> tuple[int, int, int]:
    """The number of frames in a file, and their size."""
    with av.open(str(path)) as file:
        sizes = [(frame.height, frame.width) for frame in file.decode(video=0)]
    assert len(set(sizes)) == 1
    return len(sizes), *sizes[0]


def written_by(report: dict[str, Any]) -> int:
    return sum(frames_in(path)[0] for path in report["paths"])


# A fake source: the logic of time.


def pictured(pts: int | None, time_base: Fraction) -> av.VideoFrame:
    picture = av.VideoFrame(32, 16, "gray")
    picture.pts, picture.time_base = pts, time_base
    return picture


class Reader:
    """A fake VideoReader, whose script says what each connection does, one after the other."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.opened, self.undecodable = script, 0, 0
        self.options: dict[str, Any] = {}
        self.timed = True
        self.info = type("Info", (), {"duration": None})()

    def __call__(self, *args: object, **options: object) -> Reader:
        self.opened += 1
        self.options = options
        self._now = self.script.pop(0) if self.script else UnreadableVideo("cannot be opened (refused)", "cam")
        if isinstance(self._now, Exception):
            raise self._now
        return self

    def __iter__(self) -> Iterator[Frame]:
        for item in self._now:
            if isinstance(item, Exception):
                raise item
            yield Frame(0, item, Fraction(1, 25), pictured(item, Fraction(1, 25)))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Clock:
    """A fake clock, which advances when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert len(self.waits) < 1000, "waits that never end"
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def source(
    script: list[Any], monkeypatch: pytest.MonkeyPatch, clock: Clock, **options: Any
) -> tuple[LiveSource, list[StateChange], Reader]:
    reader, changes = Reader(script), []
    monkeypatch.setattr(live, "VideoReader", reader)
    made = LiveSource(Origin("cam", "cam", PurePath("cam"), endless=True), tell=changes.append, **options)
    monkeypatch.setattr(made, "_wait", clock.wait)
    return made, changes, reader


def delivered(made: LiveSource, error: str = "no frame for") -> list[Frame]:
    """All frames of a source that is finally given up."""
    frames: list[Frame] = []
    with pytest.raises(UnreadableVideo, match=error):
        collections.deque(map(frames.append, made), maxlen=0)
    return frames


def test_reconnected_frames_continue_the_time_line(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, _ = source([[0, 1, 2], [0, 1]], monkeypatch, clock, patience=5)
    frames = delivered(made, r"cam: no frame for \d+ s in \d+ attempts; the last: .*refused")
    times = [frame.time for frame in frames]
    gap = clock.waits[0]
    assert times == pytest.approx([0, 0.04, 0.08, gap, gap + 0.04], abs=1e-3)
    assert times == sorted(set(times))
    states = [change.state for change in changes]
    assert states[:6] == ["connecting", "live", "lost", "connecting", "live", "lost"]
    assert states[-1] == "ended"
    assert made.connections == 2


def test_pauses_double_with_jitter_up_to_the_longest(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, reader = source([], monkeypatch, clock, patience=1000)
    with pytest.raises(UnreadableVideo):
        list(made)
    for number, wait in enumerate(clock.waits[:-1]):  # the last one is cut to the patience that is left
        longest = min(0.5 * 2**number, 30)
        assert longest / 2 <= wait <= longest
    assert len({round(wait / 30, 6) for wait in clock.waits[8:]}) > 5, "no jitter"
    assert reader.opened == len(clock.waits) + 1
    assert [c.attempt for c in changes if c.state == "connecting"] == list(range(1, reader.opened + 1))


@pytest.mark.parametrize("seed", range(20))
def test_patience_ends_despite_rounding(monkeypatch: pytest.MonkeyPatch, clock: Clock, seed: int) -> None:
    clock.now += random.Random(seed).random()  # so that sums of times are rounded
    made, _, reader = source([], monkeypatch, clock, patience=40)
    monkeypatch.setattr(made, "_random", random.Random(seed))
    delivered(made)
    assert sum(clock.waits) == pytest.approx(40)
    assert reader.opened == len(clock.waits) + 1


def test_no_connection_waits_longer_than_patience(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Interrupted by the end of patience, it would be reported as hanging."""
    made, _, _ = source([], monkeypatch, clock, patience=25, stall=10)
    began, waited = clock.now, list[float]()

    def silent(*args: object, **options: Any) -> Reader:
        opening, _ = options["timeout"]
        assert 0 < opening <= max(began + 25 - clock.now, live._GRACE)
        waited.append(opening)
        clock.now += opening
        raise SilentVideo("cannot be opened (it sent nothing for too long)", "cam")

    monkeypatch.setattr(live, "VideoReader", silent)
    delivered(made)
    assert waited[:2] == [10, 10]
    assert waited[2] < 5


def test_a_stable_connection_resets_the_backoff(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    refused = UnreadableVideo("refused", "cam")

    class Long(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0
            clock.now += 60
            yield 1

    script: list[Any] = [refused] * 5 + [Long(), refused]
    made, _, _ = source(script, monkeypatch, clock, patience=40)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert clock.waits[4] > 4
    assert clock.waits[5] <= 0.5


@pytest.mark.parametrize("frames", [[], [0]])
def test_connections_that_break_at_once_do_not_reset_the_backoff(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, frames: list[int]
) -> None:
    made, changes, _ = source([frames for _ in range(100)], monkeypatch, clock, patience=60)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert clock.waits[5] > 5
    assert ("live" in {change.state for change in changes}) == bool(frames)


def test_default_patience_is_half_a_minute_at_first_and_unlimited_later(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    made, _, _ = source([], monkeypatch, clock)
    with pytest.raises(UnreadableVideo, match="no frame for 3"):
        list(made)
    refused = UnreadableVideo("refused", "cam")
    made, _, reader = source([[0], *[refused] * 200, [1]], monkeypatch, clock)
    frames = iter(made)
    assert next(frames).pts == 0
    assert next(frames).time > 3600
    assert reader.opened == 202


def test_silence_is_called_stalled(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    silent = SilentVideo("reading failed (it sent nothing for too long)", "cam")
    made, changes, _ = source([[0, silent], [1]], monkeypatch, clock, patience=3)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert [c.state for c in changes][:5] == ["connecting", "live", "stalled", "connecting", "live"]
    assert changes[2].reason == "reading failed (it sent nothing for too long)"


def test_a_failure_is_not_a_stall_whatever_its_text(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    failed = UnreadableVideo("cannot be opened (file name too long)", "cam")
    made, changes, _ = source([failed], monkeypatch, clock, patience=1)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert [(c.state, c.reason) for c in changes][1] == ("lost", "cannot be opened (file name too long)")


def test_times_that_jump_back_within_a_connection_still_increase(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, _, _ = source([[5, 3, 4, 10]], monkeypatch, clock, patience=1)
    seen = [frame.pts for frame in delivered(made)]
    assert seen == sorted(set(seen))


def test_time_that_the_consumer_takes_is_not_a_stall(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, _ = source([[0], [1]], monkeypatch, clock, patience=5)

    def consume(frame: Frame) -> None:
        clock.now += 100

    with pytest.raises(UnreadableVideo):
        collections.deque(map(consume, made), maxlen=0)
    assert [c.state for c in changes][:5] == ["connecting", "live", "lost", "connecting", "live"]


def placed(steps: list[tuple[float, float]]) -> list[float]:
    """Times of frames, given the seconds between them at the source and here; their audio is shifted with them."""
    line, own, now = live._TimeLine(), 1000.0, 50.0
    times = []
    for own_step, step in [(0.0, 0.0), *steps]:
        own, now = own + own_step, now + step
        # The first packet came just after the frame before.
        packets = [packet_at(own - own_step - 0.001), packet_at(own)]
        frame = Frame(0, 0, Fraction(1, 25), pictured(round(own * 1000), Fraction(1, 1000)))
        frame.sound = [Sound(packet, Fraction(-1)) for packet in packets]
        line.place(frame, now)
        times.append(frame.time)
        if -1 < own_step < 0:  # it was moved, because times must increase
            return times
        assert [sound.time for sound in frame.sound] == pytest.approx([times[-2:][0], frame.time], abs=2e-3)
    return times


def packet_at(seconds: float) -> av.Packet:
    packet = av.Packet(b"x")
    packet.time_base = Fraction(1, 1000)
    packet.pts = packet.dts = round(seconds * 1000)
    return packet


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param([(0.04, 0.05), (0.04, 0.02)], [0, 0.04, 0.08], id="steady timestamps despite jitter"),
        pytest.param([(0.04, 0.04), (-600, 3), (0.04, 0.04)], [0, 0.04, 3.04, 3.08], id="a sender restarted"),
        pytest.param([(0.04, 0.04), (7200, 0.04), (0.04, 0.04)], [0, 0.04, 0.08, 0.12], id="its clock was set ahead"),
        pytest.param([(8, 8), (0.04, 0.04)], [0, 8, 8.04], id="a gap is a gap"),
        pytest.param([(0.04, 8), *[(0.04, 0)] * 3], [0, 0.04, 0.08, 0.12, 0.16], id="late, but none is missing"),
        pytest.param([(4, 0.04), (0.04, 0.04)], [0, 4, 4.04], id="some were lost while it was late"),
        pytest.param([(0.04, 0.04), (-0.04, 0.04)], [0, 0.04, 0.04], id="out of order"),
        pytest.param([(4, 0.04), (-600, 0.04), (0.04, 0.04)], [0, 4, 4, 4.04], id="ahead, then reset: never back"),
    ],
)
def test_times_follow_the_source_until_its_clock_is_reset(
    steps: list[tuple[float, float]], expected: list[float]
) -> None:
    assert placed(steps) == pytest.approx(expected, abs=1e-3)


def test_frames_without_timestamps_are_stamped_on_arrival() -> None:
    for timed, pts in ((False, 0), (True, None)):
        line, times = live._TimeLine(), []
        line.start_connection(timed=timed)
        for now in (50.0, 50.5, 51.5):
            frame = Frame(0, 0, Fraction(1, 25), pictured(pts, Fraction(1, 25)))
            line.place(frame, now)
            times.append(frame.time)
        assert times == pytest.approx([0, 0.5, 1.5], abs=1e-4)


def test_a_recording_ends_at_its_end(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, reader = source([[0, 1]], monkeypatch, clock)
    reader.info.duration = 2.0
    assert len(list(made)) == 2
    assert changes[-1] == StateChange("ended", "end of the source", attempt=1)


def test_the_source_waits_for_a_camera_that_has_worked(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "video0").touch()
    made, changes, reader = source([[0, 1], UnreadableVideo("gone", "cam"), [0]], monkeypatch, clock)
    made.origin = Origin(str(tmp_path / "video0"), "cam", PurePath("cam"), "v4l2", {}, endless=True)
    frames = iter(made)
    next(frames)
    (tmp_path / "video0").unlink()
    assert len([next(frames) for _ in range(2)]) == 2, "one more, and one after it came back"
    assert reader.opened == 3
    assert [change.state for change in changes].count("lost") == 2


def test_stop_ends_a_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "VideoReader", Reader([]))
    monkeypatch.setattr(live, "_FIRST_PAUSE", 600.0)
    waiting, changes = threading.Event(), []

    def tell(change: StateChange) -> None:
        changes.append(change.state)
        if change.state == "lost":
            waiting.set()

    made = LiveSource(Origin("cam", "cam", PurePath("cam"), endless=True), tell=tell)
    thread = threading.Thread(target=lambda: list(made))
    thread.start()
    assert waiting.wait(10)
    made.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert changes[-1] == "ended"


#: The second signal comes while the first one's handler, which stops the source, is about to notify the waiting thread.
NESTED = """
import signal, threading
from pathlib import PurePath
from petseg_runtime.video.live import LiveSource
from petseg_runtime.sources import Origin

notify_all, signals = threading.Condition.notify_all, [signal.SIGTERM]

def interrupted(self):
    if signals:
        signal.raise_signal(signals.pop())
    notify_all(self)

threading.Condition.notify_all = interrupted
source = LiveSource(Origin("cam", "cam", PurePath("cam"), endless=True))
signal.signal(signal.SIGTERM, lambda *_: source.stop())
source.stop()
print("stopped", *source)
"""


def test_stop_may_be_called_by_a_signal_handler_that_interrupts_another_one() -> None:
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


def test_secrets_of_urls_are_not_shown() -> None:
    for url, shown in {
        f"rtsp://me:{SECRET}@cam.local:554/live": "rtsp://***@cam.local:554/live",
        f"rtsp://me:{SECRET}@@cam/live?token={SECRET}": "rtsp://***@cam/live?***",
        f"http://cam/a@b?key={SECRET}": "http://cam/a@b?***",
        f"rtsp://cam?user=me&password={SECRET}@x/": "rtsp://cam?***",
        "rtsp://cam/live": "rtsp://cam/live",
        "0": "0",
    }.items():
        assert redacted(url) == shown
        origin = stream_origin(url)
        assert origin is not None
        assert SECRET not in f"{origin.shown} {origin.name}"
        if "://" in url:
            assert origin.shown == shown
            assert origin.target == url, "what is opened has them all"


# Connections that stay open, but stall.

#: Raw video, which FFmpeg opens without probing.
SIZE = (16, 32)
RAW = {"video_size": "32x16", "framerate": "25", "pixel_format": "gray"}


def raw(count: int) -> bytes:
    return bytes(SIZE[0] * SIZE[1] * count)


class Watched:
    """A source that a thread iterates over, with its frames and state changes so far, and its error."""

    def __init__(self, target: str, **options: Any) -> None:
        self.frames: list[Frame] = []
        self.changes: list[StateChange] = []
        self.error: Exception | None = None
        origin = Origin(target, "cam", PurePath("cam"), "rawvideo", RAW, endless=True)
        self.source = LiveSource(origin, tell=self.changes.append, **options)
        self._thread = threading.Thread(target=self._iterate, daemon=True)
        self._thread.start()

    def _iterate(self) -> None:
        try:
            self.frames.extend(self.source)
        except UnreadableVideo as error:
            self.error = error

    @property
    def states(self) -> list[str]:
        return [change.state for change in list(self.changes)]

    def ends(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "petseg-read"]


@pytest.fixture
def fifo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A named pipe: FFmpeg waits for it in the kernel without a timeout, as in the ioctl of a camera."""
    monkeypatch.setattr(live, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(live, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(live, "_GRACE", 0.2)
    os.mkfifo(tmp_path / "camera")
    return tmp_path / "camera"


@pytest.mark.timeout(60)
def test_a_hanging_read_is_a_stall_and_the_source_reconnects_when_it_returns(fifo: Path) -> None:
    watched = Watched(str(fifo), stall=0.4)
    with fifo.open("wb", buffering=0) as camera:
        camera.write(raw(30))
        until(lambda: "stalled" in watched.states)
        (hanging,) = readers()
        time.sleep(0.5)  # long enough for other attempts
        assert watched.states == ["connecting", "live", "stalled"]
        assert watched.changes[-1] == StateChange("stalled", f"no frame came for too long; {live._HANGS}", attempt=1)
        assert readers() == [hanging]  # one per attempt would pile up
    hanging.join(5)
    with fifo.open("wb", buffering=0) as camera:
        camera.write(raw(30))
        until(lambda: len(watched.frames) == 60)
        watched.source.stop()
        assert watched.ends(5)
    assert [state for state in watched.states if state in ("live", "ended")] == ["live", "live", "ended"]
    times = [frame.time for frame in watched.frames]
    assert times == sorted(set(times))
    until(lambda: not readers())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("patience", [None, 2.0])
def test_no_other_attempt_is_made_while_a_read_hangs(fifo: Path, patience: float | None) -> None:
    watched = Watched(str(fifo), stall=0.2, patience=patience)
    with fifo.open("wb", buffering=0) as camera:
        camera.write(raw(30))
        until(lambda: "stalled" in watched.states)
        if patience is None:
            watched.source.stop()
        assert watched.ends(5)
    assert watched.states == ["connecting", "live", "stalled", "ended"]
    assert watched.changes[-1].attempt == 1
    if patience is not None:
        why = f"no frame came for too long; {live._HANGS}"
        assert re.fullmatch(rf"cam: no frame for \d+ s in 1 attempts; the last: {re.escape(why)}", str(watched.error))
    until(lambda: not readers())


@pytest.mark.timeout(60)
def test_a_hanging_read_that_returns_resets_the_backoff(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    returns = threading.Event()

    class Hanging(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0
            returns.wait(30)

    refused = UnreadableVideo("refused", "cam")
    script = [*[refused] * 6, Hanging()]
    made, changes, reader = source(script, monkeypatch, clock, patience=40, stall=0.05)

    def tell(change: StateChange) -> None:
        changes.append(change)
        if change.state == "stalled":
            threading.Timer(0.2, returns.set).start()

    made._tell = tell
    assert len(delivered(made)) == 1
    stalled = [change.state for change in changes].index("stalled")
    assert [change.state for change in changes[stalled + 1 : stalled + 3]] == ["connecting", "lost"]
    assert clock.waits[5] > 7
    assert clock.waits[6] <= 0.5, "the first one after the read returned: it reconnected without a pause"
    assert [c.attempt for c in changes if c.state == "connecting"] == list(range(1, reader.opened + 1))


@pytest.mark.timeout(60)
def test_patience_for_a_first_frame_may_be_shorter_than_a_stall(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FIRST_PATIENCE", 1.0)
    watched = Watched(str(fifo), stall=60)
    ended = watched.ends(10)
    watched.source.stop()
    with fifo.open("wb", buffering=0):  # release the hanging read
        pass
    assert ended
    assert watched.states == ["connecting", "ended"]
    assert re.match(r"cam: no frame for \d+ s in 1 attempts; the last: no frame came for too long", str(watched.error))
    until(lambda: not readers())


@pytest.mark.timeout(60)
def test_a_server_that_never_answered_is_not_reported_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FIRST_PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        watched = Watched(f"http://127.0.0.1:{silent.getsockname()[1]}/live", stall=60)
        assert watched.ends(10)
    assert "it sent nothing for too long" in str(watched.error)
    assert live._HANGS not in str(watched.error)
    until(lambda: not readers())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("opened", [False, True])
def test_a_source_can_be_stopped_and_given_up_while_a_read_hangs(fifo: Path, opened: bool) -> None:
    """While it opens, and later."""
    for options, stop in (({"stall": 60.0}, True), ({"stall": 60.0, "patience": 1.0}, False)):
        watched = Watched(str(fifo), **options)
        if opened:
            with fifo.open("wb", buffering=0) as camera:
                camera.write(raw(30))
                until(lambda watched=watched: "live" in watched.states)  # type: ignore[misc]
                time.sleep(0.2)  # until it waits for more
                if stop:
                    watched.source.stop()
                assert watched.ends(5)
        else:
            time.sleep(0.2)
            if stop:
                watched.source.stop()
            assert watched.ends(5)
            with fifo.open("wb", buffering=0):  # release the hanging read
                pass
        assert watched.states[-1] == "ended"
        assert (watched.error is None) == stop
        until(lambda: not readers())


@pytest.mark.timeout(60)
def test_a_connection_whose_next_frame_waits_is_closed_when_it_is_left(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    made, _, _ = source([range(100)], monkeypatch, clock)
    frames: Any = iter(made)
    assert next(frames).pts == 0
    time.sleep(0.2)  # until the next one waits
    frames.close()
    until(lambda: not readers())


@pytest.mark.timeout(60)
def test_a_source_that_refuses_is_not_asked_without_pause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    watched = Watched(address, patience=1)
    assert watched.ends(20)
    assert 2 <= watched.states.count("connecting") <= 5


@pytest.mark.timeout(60)
def test_patience_may_be_shorter_than_a_stall() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = Watched(f"tcp://127.0.0.1:{server.getsockname()[1]}", stall=30, patience=1)
        sender, _ = server.accept()
        with sender:
            sender.sendall(raw(30))
            until(lambda: "live" in watched.states)
            assert watched.ends(20), "a stall would take longer"
    assert re.match(r"cam: no frame for \d+ s in 1 attempts; the last: ", str(watched.error))
    assert watched.states == ["connecting", "live", "ended"]


@pytest.mark.timeout(30)
def test_a_bug_in_reading_is_raised_in_the_consumer(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, _, _ = source([[0, LookupError("a defect")]], monkeypatch, clock)
    frames = iter(made)
    next(frames)
    with pytest.raises(LookupError, match="a defect"):
        next(frames)


def test_statistics_go_on_while_a_source_is_silent(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infer_video, "_STATISTICS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = ["--as", "lines", "--output", tmp_path / "out", "--model", model, "--json", "--give-up", "3"]
        assert run(["infer", f"http://127.0.0.1:{silent.getsockname()[1]}/live.ts", *map(str, words)]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    statistics = [event for event in told if event["event"] == "statistics"]
    assert len(statistics) >= 3
    assert {(event["state"], event["written"], event["connections"]) for event in statistics} == {("connecting", 0, 0)}
    seconds = [event["seconds"] for event in statistics]
    assert seconds == sorted(set(seconds))
    assert [event["event"] for event in told[-2:]] == ["video", "summary"], "none comes after the end"


# Real servers.


@needs("rtsp")
def test_rtsp_survives_restarts_another_size_and_silence(tmp_path: Path, model: Path) -> None:
    port = free_port()
    url = f"rtsp://me:{SECRET}@127.0.0.1:{port}/live"
    words = (url, "--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "2", "--verbose")
    with rtsp_server(port) as server, Run(*words) as run:
        run.more_frames()
        server.stop()
        until(lambda: "lost" in run.states())
        server.start()
        run.more_frames()
        server.stop()
        until(lambda: run.states()[-3:] == ["lost", "connecting", "lost"])
        with rtsp_server(port, "320x240") as larger:
            run.more_frames()
            seen = len(run.states())
            larger.freeze()
            until(lambda: "stalled" in run.states()[seen:])
            larger.thaw()
            run.more_frames()
            assert run.end() == 143
    report = run.report()
    assert report["stopped"]
    assert report["connections"] >= 4
    assert [frames_in(path)[1:] for path in report["paths"]] == [(120, 160), (240, 320)]
    assert written_by(report) == report["written"]
    assert run.states()[:4] == ["connecting", "live", "lost", "connecting"]
    assert run.states()[-1] == "ended"
    assert_wall_clock(run)
    assert SECRET not in run.err + json.dumps(run.events) + " ".join(map(str, tmp_path.rglob("*")))


def assert_wall_clock(run: Run) -> None:
    """Check that times increase with the wall clock, however often the source reconnected."""
    frames = [(at, e["time"]) for at, e in zip(run.times, run.events, strict=True) if e["event"] == "frame"]
    times = [time for _, time in frames]
    assert times == sorted(set(times))
    (first_at, first), (last_at, last) = frames[0], frames[-1]
    assert last - first == pytest.approx(last_at - first_at, abs=2)


@needs("rtsp")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_while_the_source_is_silent(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    port = free_port()
    with rtsp_server(port) as server:
        words = (f"rtsp://127.0.0.1:{port}/live", "--as", "overlay", "--model", model, "--stall", "60")
        with Run(*words, "--output", tmp_path / "out") as run:
            run.more_frames()
            server.freeze()
            assert_ends_in_order(run, number)
        report = run.report()
        assert written_by(report) == report["written"]
        server.thaw()


@pytest.mark.parametrize(
    ("state", "number"), [("connecting", signal.SIGTERM), ("connecting", signal.SIGINT), ("lost", signal.SIGINT)]
)
def test_a_signal_ends_it_in_order_before_the_first_frame(
    tmp_path: Path, model: Path, state: str, number: signal.Signals
) -> None:
    """While connected to a server that sends nothing, or between two attempts to reach a missing one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if state == "connecting" else free_port()
        words = (f"rtsp://127.0.0.1:{port}/live", "--as", "overlay", "--model", model, "--stall", "60")
        with Run(*words, "--output", tmp_path / "out") as run:
            until(lambda: state in run.states())
            assert_ends_in_order(run, number)
    assert run.report()["written"] == 0
    assert not (tmp_path / "out").exists() or not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def assert_ends_in_order(run: Run, number: signal.Signals) -> None:
    start = time.monotonic()
    assert run.end(number) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert time.monotonic() - start < 10
    assert run.err == ""
    assert run.states()[-1] == "ended"
    assert run.report()["stopped"]


#: A signal that another thread receives, so that nothing wakes the main thread, which waits for a silent source.
UNAWARE = """
import signal, sys, threading, time
def work():
    while not any(thread.name == "petseg-decode" for thread in threading.enumerate()):
        time.sleep(0.05)
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=work, daemon=True).start()
"""
OF_A_COMMAND = "from petseg.cli import main; main()"
OF_A_PROGRAM = """
from petseg_runtime import Segmenter
try:
    with Segmenter(sys.argv[3]) as segmenter, segmenter.stream(sys.argv[4], stall=60) as stream:
        next(iter(stream))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [OF_A_COMMAND, OF_A_PROGRAM], ids=["command", "program"])
def test_a_signal_that_does_not_wake_the_main_thread_is_handled(tmp_path: Path, model: Path, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        words = ["infer", "--model", model, url, "--as", "overlay", "--stall", "60", "--output", tmp_path / "out"]
        done = subprocess.run([sys.executable, "-c", UNAWARE + how, *words], capture_output=True, timeout=40)
    assert done.returncode == 130, done.stderr


def test_python_does_not_shut_down_while_a_thread_waits_for_a_source(tmp_path: Path, model: Path) -> None:
    """FFmpeg calls Python to check its timeout; after Python's end, that crashed one process in thirty."""
    own_end = "import atexit; atexit.register(print, 'taken down')\n"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        words = ["infer", "--model", model, url, "--as", "lines", "--stall", "60", "--output", tmp_path, "--json"]
        command = [sys.executable, "-c", own_end + UNAWARE + OF_A_COMMAND, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 130
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "summary"


#: A command that ends in an exception, with or without such a thread beside it.
ENDS = """
import atexit, signal, threading, time
from petseg.cli import main, petseg

def command(**_):
    print("begun")
    if {waits}:
        threading.Thread(target=time.sleep, args=(600,), name="petseg-read", daemon=True).start()
    {ends}

atexit.register(print, "taken down")
petseg.main = command
main()
"""


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("signal.raise_signal(signal.SIGTERM)", 143, "petseg: terminated"),
        ("raise SystemExit", 0, None),
        ("raise LookupError('a defect')", 1, "LookupError: a defect"),
    ],
)
def test_nor_does_it_after_an_exception(waits: bool, ends: str, code: int, said: str | None) -> None:
    program = ENDS.format(waits=waits, ends=ends)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=40)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1:] == ([said] if said else [])
    assert done.stderr.startswith("Traceback") == (code == 1)
    assert done.stdout.splitlines() == ["begun"] if waits else ["begun", "taken down"]


#: Leaves a stream whose decoder hangs in a read, and exits.
LEAVES = """
import sys, threading
from petseg_runtime import Segmenter
silent = threading.Event()
with Segmenter(sys.argv[1]) as segmenter:
    with segmenter.stream(sys.argv[2], tell=lambda change: silent.set()) as stream:
        silent.wait()
print(stream.counts.decoded)
"""


def test_a_process_ends_cleanly_while_its_decoder_hangs_in_a_read(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/live.ts"
        done = subprocess.run([sys.executable, "-c", LEAVES, model, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_when_python_exits_ffmpeg_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks PyAV whether to wait on; during Python's shutdown that would crash the process now and then."""
    monkeypatch.setitem(vars(core), "time", time)  # restored afterwards
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/live.ts"
        connection = live._Connection(lambda: VideoReader(url, options={}, timeout=(60, 60)), threading.Condition())
        with silent.accept()[0]:
            live._leave_all()
            assert not connection.runs


@needs("rtsp")
def test_a_wrong_path_and_a_missing_server_are_given_up(tmp_path: Path, model: Path) -> None:
    port, nobody = free_port(), free_port()
    with rtsp_server(port), socket.create_server(("127.0.0.1", 0)) as silent:
        reasons = {
            f"127.0.0.1:{port}/nothing": "404",
            f"127.0.0.1:{nobody}/live": "refused",
            f"127.0.0.1:{silent.getsockname()[1]}/live": "it sent nothing for too long",
        }
        urls = [f"rtsp://me:{SECRET}@{address}" for address in reasons]
        with Run(*urls, "--as", "lines", "--model", model, "--output", tmp_path, "--give-up", "2.5") as run:
            assert run.wait(40) == 1
    for address, reason in reasons.items():
        report = run.report(address)
        assert report["written"] == 0
        assert reason in report["error"]
        assert run.states(address)[-1] == "ended"
    assert SECRET not in run.err + json.dumps(run.events)
    assert len(run.err.splitlines()) == len(reasons)


def test_a_password_is_in_no_traceback() -> None:
    for url in (f"rtsp://me:{SECRET}@127.0.0.1:{free_port()}/live", f"http://me:{SECRET}@127.0.0.1:{free_port()}/a.ts"):
        origin = stream_origin(url)
        assert origin
        with pytest.raises(UnreadableVideo) as raised:
            VideoReader(origin.target, name=origin.shown, options=origin.options, timeout=(5, 5))
        assert SECRET not in "".join(traceback.format_exception(raised.value))


@needs("rtsp")
def test_a_dead_source_does_not_disturb_the_others(tmp_path: Path, model: Path) -> None:
    port, dead = free_port(), free_port()
    with rtsp_server(port):
        urls = [f"rtsp://127.0.0.1:{port}/live", f"rtsp://127.0.0.1:{dead}/live", CAMERA]
        with Run(*urls, "--as", "lines", "--model", model, "--output", tmp_path / "out", "--give-up", "5") as run:
            until(lambda: any(e["event"] == "video" for e in list(run.events)))
            run.more_frames(10, str(port))
            run.more_frames(10, "lavfi")
            assert run.end() == 3
        assert run.report(str(dead))["error"]
        for name in (str(port), "lavfi"):
            report = run.report(name)
            assert not report["error"]
            (path,) = report["paths"]
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
            assert [line["number"] for line in lines] == sorted(line["number"] for line in lines)
            assert len(lines) == report["written"]
        assert len({Path(p).parent for name in (str(port), "lavfi") for p in run.report(name)["paths"]}) == 2


@needs("rtmp")
def test_rtmp_through_nginx_survives_its_publisher_and_keeps_its_audio(tmp_path: Path, model: Path) -> None:
    port = free_port()
    words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "2")
    with (
        rtmp_server(port, tmp_path),
        rtmp_sender(port, sound=True) as publisher,
        Run(f"rtmp://127.0.0.1:{port}/live/cam", *words) as run,
    ):
        run.more_frames()
        seen = len(run.states())
        publisher.stop()
        until(lambda: {"lost", "stalled"} & set(run.states()[seen:]))
        publisher.start()
        run.more_frames()
        assert run.end(signal.SIGINT) == 130
    report = run.report()
    assert report["connections"] >= 2
    assert written_by(report) == report["written"]
    assert_wall_clock(run)
    with av.open(report["paths"][0]) as movie:
        assert movie.streams.audio[0].codec_context.name == "aac"


@needs("ffmpeg")
def test_http_reconnects_when_the_server_comes_back(tmp_path: Path, model: Path) -> None:
    port = free_port()
    words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out", "--give-up", "60")
    with Run(f"http://127.0.0.1:{port}/live.ts", *words) as run:
        for round_ in range(2):  # each server sends for a second, and exits
            with http_sender(port, seconds=1, sound=True) as server:
                until(lambda round_=round_: run.states().count("live") == round_ + 1)
                server.process.wait(40)
        assert run.end() == 143
    report = run.report()
    assert report["connections"] == 2
    assert written_by(report) == report["written"]
    assert_wall_clock(run)
    # AAC of a transport stream cannot be passed through to a file whose header is written first.
    assert "the audio (aac) is re-encoded as aac" in run.err
    with av.open(report["paths"][0]) as movie:
        heard = list(movie.decode(movie.streams.audio[0]))
    assert sum(frame.samples for frame in heard) / heard[0].sample_rate == pytest.approx(2, rel=0.3)


@needs("ffmpeg")
def test_motion_jpeg_without_timestamps_is_stamped_on_arrival(tmp_path: Path, model: Path) -> None:
    port = free_port()
    words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out")
    with Run(f"http://127.0.0.1:{port}/live", *words) as run, motion_jpeg_sender(port, 10):
        run.more_frames(20)
        assert run.end() == 143
    times = [e["time"] for e in run.events if e["event"] == "frame"]
    assert (times[-1] - times[5]) / (len(times) - 6) == pytest.approx(0.1, rel=0.4), "FFmpeg would guess 0.04"
    assert written_by(run.report()) == run.report()["written"]


@needs("ffmpeg")
def test_hls_follows_its_playlist(tmp_path: Path, model: Path) -> None:
    port = free_port()
    (tmp_path / "hls").mkdir()
    with hls_server(port, tmp_path / "hls"):
        words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out")
        with Run(f"http://127.0.0.1:{port}/live.m3u8", *words) as run:
            run.more_frames(30)
            assert run.end() == 143
    report = run.report()
    assert report["connections"] == 1
    assert written_by(report) == report["written"]


@needs("ffmpeg")
def test_udp_survives_lost_packets_and_noise_is_a_stall(tmp_path: Path, model: Path) -> None:
    port, behind = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "2")
    with Relay(port, behind, loss=0.05) as relay, udp_sender(port), Run(f"udp://127.0.0.1:{behind}", *words) as run:
        run.more_frames(30)
        assert relay.lost
        assert run.states() == ["connecting", "live"]
        relay.loss, relay.spoilt = 0, True
        until(lambda: "stalled" in run.states())
        relay.spoilt = False
        until(lambda: run.states().count("live") == 2)
        run.more_frames(5)
        assert run.end() == 143
    report = run.report()
    assert written_by(report) == report["written"]
    assert_wall_clock(run)
    (stalled,) = (e for e in run.events if e.get("state") == "stalled")
    assert "it sent data, but no frame" in stalled["reason"]


@needs("ffmpeg")
def test_a_change_of_size_starts_a_new_file(tmp_path: Path, model: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)
    words = ("--as", "mask", "--model", model, "--output", tmp_path / "out", "--stall", "20")
    with Run(f"udp://127.0.0.1:{port}", *words) as run:
        for size in ("160x120", "320x240", "160x120"):
            height = int(size.partition("x")[2])
            with udp_sender(port, size):
                until(lambda height=height: run.events[-1:] and run.events[-1].get("height") == height)
                run.more_frames(10)
        assert run.end() == 143
    report = run.report()
    assert report["connections"] == 1, "a change of size is not a reconnect"
    assert [frames_in(path)[1] for path in report["paths"]] == [120, 240, 120]
    assert written_by(report) == report["written"]
    assert_wall_clock(run)  # though each sender restarts its timestamps


@pytest.mark.parametrize("policy", POLICIES)
def test_a_slow_consumer_of_a_camera_gets_frames_by_policy(model: Path, policy: str) -> None:
    taken = 0
    with Segmenter(model) as segmenter, segmenter.stream(CAMERA, policy=policy) as stream:
        for _ in stream:
            taken += 1
            if taken == 12:
                stream.stop()
            time.sleep(0.12)  # three frames' time
    counts = stream.counts
    assert counts.decoded == counts.delivered + counts.dropped + counts.failed
    assert taken == counts.delivered
    assert (counts.dropped > 0) == (policy != "block")


def test_a_camera_is_recorded_in_segments(tmp_path: Path, model: Path) -> None:
    words = ("--as", "overlay", "--model", model, "--output", tmp_path, "--segment", "0.4", "--policy", "block")
    for _ in range(2):
        with Run(CAMERA, *words, "--max-frames", "25") as run:
            assert run.wait() == 0
        assert run.report()["written"] == 25
    pieces = sorted((tmp_path / "lavfi").iterdir())
    assert [piece.name for piece in pieces] == [f"{n:04d}.mp4" for n in range(1, 7)]
    assert [frames_in(piece)[0] for piece in pieces] == [10, 10, 5] * 2


def test_a_file_is_playable_after_kill_9(tmp_path: Path, model: Path) -> None:
    with Run(CAMERA, "--as", "overlay", "--model", model, "--output", tmp_path) as run:
        until(lambda: run.frames() >= 75)
        run.process.kill()
        run.wait()
    count, height, width = frames_in(tmp_path / "lavfi" / "0001.mp4")
    assert count >= 25, "two seconds may be missing"
    assert (height, width) == (120, 160)


@pytest.mark.skipif(os.path.lexists("/dev/video7"), reason="a camera is there")
def test_a_missing_camera_is_an_error_at_once_unless_patience_is_set(tmp_path: Path, model: Path) -> None:
    command = ("7", "--as", "lines", "--model", model, "--output", tmp_path)
    begun = time.monotonic()
    with Run(*command) as run:
        assert run.wait() == 1
    assert time.monotonic() - begun < live.FIRST_PATIENCE / 2
    assert run.err.startswith("petseg: /dev/video7: there is no such camera; ")
    assert len(run.err.splitlines()) == 1
    assert [event["state"] for event in run.events if event["event"] == "state"] == ["ended"]
    with Run(*command, "--give-up", "0.1") as run:
        assert run.wait() == 1
    assert run.err.startswith("petseg: /dev/video7: no frame for")
