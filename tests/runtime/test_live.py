"""Live sources against real servers on loopback: they break, fall silent, change, and the run goes on."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

import av
import pytest

from petseg_runtime import live
from petseg_runtime.errors import UnreadableVideo
from petseg_runtime.live import LiveSource, StateChange
from petseg_runtime.sources import Origin, redacted, stream_origin
from petseg_runtime.video import Frame

SECRET = "s3cret"

#: Pictures from GStreamer's RTSP server, of a size; run by the system's Python, which has its bindings.
RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
port, width, height = sys.argv[1:]
server = GstRtspServer.RTSPServer(service=port, address="127.0.0.1")
factory = GstRtspServer.RTSPMediaFactory(shared=True)
factory.set_launch(
    f"( videotestsrc is-live=true pattern=ball ! video/x-raw,width={width},height={height},framerate=25/1 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=12 ! rtph264pay name=pay0 pt=96 )"
)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""

NGINX = """
load_module modules/ngx_rtmp_module.so;
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 64; }}
rtmp {{ server {{ listen 127.0.0.1:{port}; chunk_size 4096; application live {{ live on; record off; }} }} }}
"""


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 40) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Server:
    """A program that is started, stopped, frozen, and gone at the end."""

    def __init__(self, *command: object, ready: Callable[[], Any] | None = None) -> None:
        self._command, self._ready = [str(word) for word in command], ready
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if self._ready:
            until(self._ready)
        elif self.process.stdout:
            assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def needs_ffmpeg() -> str:
    return shutil.which("ffmpeg") or pytest.skip("ffmpeg is not installed (Debian: ffmpeg)")


def rtsp_server(port: int, size: str = "160x120") -> Server:
    python = "/usr/bin/python3"
    script = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if not Path(python).exists() or subprocess.run([python, "-c", script], capture_output=True).returncode:
        pytest.skip("GStreamer's RTSP server is not installed (Debian: gir1.2-gst-rtsp-server-1.0, python3-gi)")
    plugins = subprocess.run(["find", "/usr/lib", "-name", "libgstx264.so"], capture_output=True, text=True).stdout
    if not plugins:
        pytest.skip("GStreamer's x264 is not installed (Debian: gstreamer1.0-plugins-ugly, -good, -bad)")
    return Server(python, "-c", RTSP_SERVER, port, *size.split("x"))


def pictures(size: str = "160x120", seconds: int = 600) -> list[str]:
    """FFmpeg's words for a live picture."""
    lavfi = f"testsrc2=size={size}:rate=25:duration={seconds}"
    encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "12", "-pix_fmt", "yuv420p"]
    return ["-v", "error", "-re", "-f", "lavfi", "-i", lavfi, *encoder]


@pytest.fixture
def model(tmp_path: Path, toy: Any) -> Path:
    path: Path = toy(tmp_path / "toy.onnx").path
    return path


class Run:
    """`petseg infer` as people run it; its events as they come."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "petseg.cli", "infer", *map(str, words), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self.err = ""
        self._threads = [threading.Thread(target=read) for read in (self._read_events, self._read_err)]
        for thread in self._threads:
            thread.start()

    def _read_events(self) -> None:
        for line in self.process.stdout or ():
            self.events.append(json.loads(line))

    def _read_err(self) -> None:
        self.err = self.process.stderr.read() if self.process.stderr else ""

    def states(self, name: str = "") -> list[str]:
        events = [e for e in self.events if e["event"] == "state" and name in e["input"]]
        return [event["state"] for event in events]

    def frames(self, name: str = "") -> int:
        return sum(e["event"] == "frame" and name in e["input"] for e in self.events)

    def more_frames(self, count: int = 5, name: str = "") -> None:
        before = self.frames(name)
        until(lambda: self.frames(name) >= before + count)

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 40) -> int:
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        return code

    def report(self, name: str = "") -> dict[str, Any]:
        """The event at the end of a source; every frame of it is accounted for."""
        (report,) = (e for e in self.events if e["event"] == "video" and name in e["input"])
        frames = report["frames"]
        assert frames["decoded"] == report["written"] + frames["dropped"] + frames["failed"]
        assert report["written"] == self.frames(name)
        return report

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()


def frames_in(path: Path | str) -> tuple[int, int, int]:
    """How many frames a file gives, and their size."""
    with av.open(str(path)) as file:
        sizes = [(frame.height, frame.width) for frame in file.decode(video=0)]
    assert len(set(sizes)) == 1
    return len(sizes), *sizes[0]


def written_by(report: dict[str, Any]) -> int:
    return sum(frames_in(path)[0] for path in report["paths"])


# A source that is made up: the logic of time.


class Reader:
    """In place of VideoReader: what each connection does, one after the other."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.opened, self.undecodable = script, 0, 0
        self.info = type("Info", (), {"duration": None})()

    def __call__(self, *args: object, **options: object) -> Reader:
        self.opened += 1
        self._now = self.script.pop(0) if self.script else UnreadableVideo("cam: cannot be opened (refused)")
        if isinstance(self._now, Exception):
            raise self._now
        return self

    def __iter__(self) -> Iterator[Frame]:
        for item in self._now:
            if isinstance(item, Exception):
                raise item
            yield Frame(0, item, Fraction(1, 25), av.VideoFrame(32, 16, "gray"))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


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
    monkeypatch.setattr(made._stopped, "wait", clock.wait)
    return made, changes, reader


def delivered(made: LiveSource, error: str = "no frame for") -> list[Frame]:
    """All frames of a source that is given up in the end."""
    frames: list[Frame] = []
    with pytest.raises(UnreadableVideo, match=error):
        collections.deque(map(frames.append, made), maxlen=0)
    return frames


def test_a_broken_connection_is_made_anew_on_the_same_time_line(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, _ = source([[0, 1, 2], [50, 51]], monkeypatch, clock, patience=5)
    frames = delivered(made, r"cam: no frame for \d+ s in \d+ attempts; the last: .*refused")
    times = [frame.time for frame in frames]
    gap = clock.waits[0]
    assert times == pytest.approx([0, 0.04, 0.08, gap + 2.0, gap + 2.04], abs=1e-3)
    assert times == sorted(set(times))
    states = [change.state for change in changes]
    assert states[:6] == ["connecting", "live", "lost", "connecting", "live", "lost"]
    assert states[-1] == "ended"
    assert made.connections == 2


def test_pauses_double_with_jitter_up_to_the_longest(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, reader = source([], monkeypatch, clock, patience=1000)
    with pytest.raises(UnreadableVideo):
        list(made)
    for number, wait in enumerate(clock.waits):
        longest = min(0.5 * 2**number, 30)
        assert longest / 2 <= wait <= longest
    assert len({round(wait / 30, 6) for wait in clock.waits[8:]}) > 5, "no jitter"
    assert reader.opened == len(clock.waits) + 1
    assert [c.attempt for c in changes if c.state == "connecting"] == list(range(1, reader.opened + 1))


def test_a_connection_that_lasted_makes_the_next_pause_short(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    refused = UnreadableVideo("cam: refused")

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


def test_connections_without_frames_do_not_shorten_the_pauses(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, _ = source([[] for _ in range(100)], monkeypatch, clock, patience=60)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert clock.waits[5] > 5
    assert "live" not in {change.state for change in changes}


def test_without_patience_said_half_a_minute_is_tried_at_first_and_for_ever_later(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    made, _, _ = source([], monkeypatch, clock)
    with pytest.raises(UnreadableVideo, match="no frame for 3"):
        list(made)
    refused = UnreadableVideo("cam: refused")
    made, _, reader = source([[0], *[refused] * 200, [1]], monkeypatch, clock)
    frames = iter(made)
    assert next(frames).pts == 0
    assert next(frames).time > 3600
    assert reader.opened == 202


def test_silence_is_called_stalled(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    silent = UnreadableVideo("cam: reading it failed (it sent nothing for too long)")
    made, changes, _ = source([[0, silent], [1]], monkeypatch, clock, patience=3)
    with pytest.raises(UnreadableVideo):
        list(made)
    assert [c.state for c in changes][:5] == ["connecting", "live", "stalled", "connecting", "live"]
    assert changes[2].reason == "reading it failed (it sent nothing for too long)"


def test_times_that_jump_back_within_a_connection_still_grow(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, _, _ = source([[5, 3, 4, 10]], monkeypatch, clock, patience=1)
    seen = [frame.pts for frame in delivered(made)]
    assert seen == sorted(set(seen))


def test_a_recording_ends_at_its_end(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    made, changes, reader = source([[0, 1]], monkeypatch, clock)
    reader.info.duration = 2.0
    assert len(list(made)) == 2
    assert changes[-1] == StateChange("ended", "its end", attempt=1)


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
        assert origin is None or SECRET not in f"{origin.shown} {origin.name}"


# Real servers.

servers = pytest.mark.servers


@servers
def test_rtsp_survives_restarts_another_size_and_silence(tmp_path: Path, model: Path) -> None:
    port = free_port()
    url = f"rtsp://me:{SECRET}@127.0.0.1:{port}/live"
    with rtsp_server(port) as server:
        with Run(url, "--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "2") as run:
            run.more_frames()
            server.stop()
            until(lambda: "lost" in run.states())
            with rtsp_server(port, "320x240") as larger:
                run.more_frames()
                larger.freeze()
                until(lambda: "stalled" in run.states())
                larger.thaw()
                run.more_frames()
                assert run.end() == 143
        report = run.report()
        assert report["stopped"]
        assert report["connections"] >= 3
        sizes = [frames_in(path)[1:] for path in report["paths"]]
        assert sizes == [(120, 160), (240, 320)]
        assert written_by(report) == report["written"]
        assert run.states()[:4] == ["connecting", "live", "lost", "connecting"]
        assert run.states()[-1] == "ended"
        everything = run.err + json.dumps(run.events) + " ".join(map(str, tmp_path.rglob("*")))
        assert SECRET not in everything
        server.start()  # for the end of the block


@servers
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
            start = time.monotonic()
            assert run.end(number) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
            assert time.monotonic() - start < 10
            report = run.report()
            assert written_by(report) == report["written"]
            assert run.err == ""
        server.thaw()


@servers
def test_a_wrong_path_and_a_server_that_is_not_there_are_given_up(tmp_path: Path, model: Path) -> None:
    port, nobody = free_port(), free_port()
    with rtsp_server(port):
        for url, reason in (
            (f"rtsp://me:{SECRET}@127.0.0.1:{port}/nothing", "404"),
            (f"rtsp://me:{SECRET}@127.0.0.1:{nobody}/live", "refused"),
        ):
            with Run(url, "--as", "lines", "--model", model, "--output", tmp_path, "--give-up", "1") as run:
                assert run.wait() == 1
            report = run.report()
            assert report["written"] == 0
            assert reason in report["error"]
            assert SECRET not in run.err + json.dumps(run.events)
            assert len(run.err.splitlines()) == 1
            assert run.states()[-1] == "ended"


@servers
def test_a_dead_source_does_not_disturb_the_others(tmp_path: Path, model: Path) -> None:
    port, dead = free_port(), free_port()
    camera = "lavfi:testsrc2=size=160x120:rate=25,realtime"
    with rtsp_server(port):
        urls = [f"rtsp://127.0.0.1:{port}/live", f"rtsp://127.0.0.1:{dead}/live", camera]
        with Run(*urls, "--as", "lines", "--model", model, "--output", tmp_path / "out", "--give-up", "2") as run:
            until(lambda: any(e["event"] == "video" for e in run.events))
            run.more_frames(10, str(port))
            run.more_frames(10, "lavfi")
            assert run.end() == 143
        assert run.report(str(dead))["error"]
        for name in (str(port), "lavfi"):
            report = run.report(name)
            assert not report["error"]
            (path,) = report["paths"]
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
            assert [line["number"] for line in lines] == sorted(line["number"] for line in lines)
            assert len(lines) == report["written"]
        assert len({Path(p).parent for name in (str(port), "lavfi") for p in run.report(name)["paths"]}) == 2


@servers
def test_rtmp_through_nginx_survives_its_publisher(tmp_path: Path, model: Path) -> None:
    ffmpeg, nginx = needs_ffmpeg(), shutil.which("nginx") or "/usr/sbin/nginx"
    module = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
    if not Path(nginx).exists() or not module.exists():
        pytest.skip("nginx with RTMP is not installed (Debian: nginx, libnginx-mod-rtmp)")
    port = free_port()
    config = tmp_path / "nginx.conf"
    config.write_text(
        NGINX.format(folder=tmp_path, port=port).replace("modules/ngx", f"{module.parent}/ngx"), encoding="utf-8"
    )
    url = f"rtmp://127.0.0.1:{port}/live/cam"
    publish = (ffmpeg, *pictures(), "-f", "flv", url)
    with Server(nginx, "-c", config, "-p", tmp_path, ready=lambda: listens(port)):
        with Server(*publish, ready=lambda: True) as publisher:
            words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "2")
            with Run(url, *words) as run:
                run.more_frames()
                publisher.stop()
                until(lambda: {"lost", "stalled"} & set(run.states()))
                publisher.start()
                run.more_frames()
                assert run.end(signal.SIGINT) == 130
        report = run.report()
        assert report["connections"] >= 2
        assert written_by(report) == report["written"]


@servers
def test_http_is_connected_anew_when_the_server_comes_back(tmp_path: Path, model: Path) -> None:
    ffmpeg, port = needs_ffmpeg(), free_port()
    url = f"http://127.0.0.1:{port}/live.ts"
    serve = (ffmpeg, *pictures(seconds=2), "-f", "mpegts", "-listen", "1", url)
    with Run(url, "--as", "overlay", "--model", model, "--output", tmp_path / "out", "--give-up", "60") as run:
        for round_ in range(3):  # each server sends two seconds, and is gone
            with Server(*serve, ready=lambda: True) as server:
                until(lambda round_=round_: run.states().count("live") == round_ + 1)
                server.process.wait(40)
        assert run.end() == 143
    report = run.report()
    assert report["connections"] == 3
    assert written_by(report) == report["written"]


@servers
def test_udp_with_lost_packets_goes_on(tmp_path: Path, model: Path) -> None:
    ffmpeg = needs_ffmpeg()
    port, behind = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    stop = threading.Event()

    def lossy() -> None:
        """Every twentieth packet is lost on the way."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.bind(("127.0.0.1", port))
            relay.settimeout(0.2)
            count = 0
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    packet = relay.recv(65536)
                    count += 1
                    if count % 20:
                        relay.sendto(packet, ("127.0.0.1", behind))

    thread = threading.Thread(target=lossy)
    thread.start()
    try:
        send = (ffmpeg, *pictures(), "-f", "mpegts", f"udp://127.0.0.1:{port}?pkt_size=1316")
        with Server(*send, ready=lambda: True):
            words = ("--as", "overlay", "--model", model, "--output", tmp_path / "out", "--stall", "5")
            with Run(f"udp://127.0.0.1:{behind}", *words) as run:
                run.more_frames(60)
                assert run.end() == 143
    finally:
        stop.set()
        thread.join()
    report = run.report()
    assert report["written"] >= 60
    assert written_by(report) == report["written"]
    assert report["connections"] == 1


@servers
def test_a_change_of_size_in_mid_stream_begins_a_new_file(tmp_path: Path, model: Path) -> None:
    ffmpeg, port = needs_ffmpeg(), free_port(socket.SOCK_DGRAM)
    target = f"udp://127.0.0.1:{port}?pkt_size=1316"
    with Run(
        f"udp://127.0.0.1:{port}", "--as", "mask", "--model", model, "--output", tmp_path / "out", "--stall", "20"
    ) as run:
        for size in ("160x120", "320x240", "160x120"):
            with Server(ffmpeg, *pictures(size), "-f", "mpegts", target, ready=lambda: True):
                height = int(size.partition("x")[2])
                until(lambda height=height: run.events[-1:] and run.events[-1].get("height") == height)
                run.more_frames(10)
        assert run.end() == 143
    report = run.report()
    assert report["connections"] == 1, "a change of size is no break"
    assert [frames_in(path)[1] for path in report["paths"]] == [120, 240, 120]
    assert written_by(report) == report["written"]


def test_a_camera_of_ffmpeg_in_pieces(tmp_path: Path, model: Path) -> None:
    camera = "lavfi:testsrc2=size=160x120:rate=25,realtime"
    words = ("--as", "overlay", "--model", model, "--output", tmp_path, "--segment", "1", "--policy", "block")
    for _ in range(2):
        with Run(camera, *words, "--max-frames", "60") as run:
            assert run.wait() == 0
        assert run.report()["written"] == 60
    pieces = sorted((tmp_path / "lavfi").iterdir())
    assert [piece.name for piece in pieces] == [f"{n:04d}.mp4" for n in range(1, 7)]
    assert [frames_in(piece)[0] for piece in pieces] == [25, 25, 10] * 2


def test_what_was_written_before_kill_9_can_be_played(tmp_path: Path, model: Path) -> None:
    camera = "lavfi:testsrc2=size=160x120:rate=25,realtime"
    with Run(camera, "--as", "overlay", "--model", model, "--output", tmp_path) as run:
        until(lambda: run.frames() >= 120)
        run.process.kill()
        run.wait()
    count, height, width = frames_in(tmp_path / "lavfi" / "0001.mp4")
    assert count >= 50, "two seconds and what the encoder holds may be missing"
    assert (height, width) == (120, 160)


@pytest.mark.skipif(os.path.lexists("/dev/video7"), reason="a camera is there")
def test_a_camera_that_is_not_there_is_named(tmp_path: Path, model: Path) -> None:
    with Run("/dev/video7", "--as", "lines", "--model", model, "--output", tmp_path, "--give-up", "0.1") as run:
        assert run.wait() == 1
    assert run.err.startswith("petseg: /dev/video7: no frame for")
