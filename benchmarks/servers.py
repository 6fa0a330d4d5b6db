"""Stream servers and senders on loopback, and `petseg infer` on them: for the soak, and for the tests of live sources.

Each is a separate process on a free port. :func:`lacking` names the Debian packages that are missing.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

__all__ = [
    "Relay",
    "Run",
    "Server",
    "free_port",
    "hls_server",
    "http_sender",
    "lacking",
    "motion_jpeg_sender",
    "rtmp_sender",
    "rtmp_server",
    "rtsp_server",
    "udp_sender",
    "until",
]

#: The system's Python, for which Debian packages GStreamer's bindings.
_PYTHON: Final = Path("/usr/bin/python3")

_RTSP: Final = """
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

_NGINX: Final = """
load_module {module};
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 64; }}
rtmp {{ server {{ listen 127.0.0.1:{port}; chunk_size 4096; application live {{ live on; record off; }} }} }}
"""
_NGINX_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")


def lacking(*kinds: str) -> str | None:
    """Return why servers of these kinds cannot be started here: the Debian packages that are missing.

    Args:
        kinds: ``ffmpeg``, ``rtsp``, ``rtmp``.

    Returns:
        The reason; None: nothing is missing.
    """
    needed: dict[str, dict[str, object]] = {
        "ffmpeg": {"ffmpeg": shutil.which("ffmpeg")},
        "rtmp": {"ffmpeg": shutil.which("ffmpeg"), "nginx": _nginx(), "libnginx-mod-rtmp": _NGINX_MODULE.exists()},
        "rtsp": {
            "python3-gi": _PYTHON.exists() and Path("/usr/lib/python3/dist-packages/gi").exists(),
            "gir1.2-gst-rtsp-server-1.0": _installed("girepository-1.0/GstRtspServer-1.0.typelib"),
            "gstreamer1.0-plugins-base": _installed("gstreamer-1.0/libgstvideotestsrc.so"),
            "gstreamer1.0-plugins-good": _installed("gstreamer-1.0/libgstrtp.so"),
            "gstreamer1.0-plugins-ugly": _installed("gstreamer-1.0/libgstx264.so"),
        },
    }
    packages = [name for kind in kinds for name, there in needed[kind].items() if not there]
    return f"Debian packages not installed: {', '.join(dict.fromkeys(packages))}" if packages else None


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _installed(library: str) -> bool:
    return any(Path("/usr/lib").glob(f"*/{library}"))


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a loopback port that is unused now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 40) -> Any:
    """Wait until a condition is true, and return its value.

    Raises:
        AssertionError: It is still false after so many seconds.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"the condition is still false after {seconds:g} s")
        time.sleep(0.02)
    return value


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Server:
    """A program that can be started, stopped and frozen. As a context manager, it is stopped at the end."""

    def __init__(self, *command: object, ready: str | int | None = None) -> None:
        """Start the program, and wait until it is ready.

        Args:
            command: The program and its arguments.
            ready: The line that it prints, or the port that it listens on, when it is ready; None: do not wait.
        """
        self._command, self._ready = [str(word) for word in command], ready
        self.start()

    def start(self) -> None:
        """Start the program, also again after :meth:`stop`."""
        pipe = subprocess.PIPE if isinstance(self._ready, str) else subprocess.DEVNULL
        self.process = subprocess.Popen(self._command, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        if self.process.stdout:
            line = self.process.stdout.readline()
            assert line.strip() == self._ready, f"{self._command[0]} did not start: {line!r}"
        elif isinstance(self._ready, int):
            port = self._ready
            until(lambda: _listens(port))

    def stop(self) -> None:
        """Kill the program."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def freeze(self) -> None:
        """Suspend the program: it keeps its connections, and sends nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume the program."""
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def rtsp_server(port: int, size: str = "160x120") -> Server:
    """Start GStreamer's RTSP server, with a video stream at ``rtsp://127.0.0.1:PORT/live``."""
    return Server(_PYTHON, "-c", _RTSP, port, *size.split("x"), ready="ready")


def rtmp_server(port: int, folder: Path) -> Server:
    """Start nginx as an RTMP server that accepts publishers."""
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(module=_NGINX_MODULE, folder=folder, port=port), encoding="utf-8")
    return Server(_nginx(), "-c", config, "-p", folder, ready=port)


def _pictures(size: str, seconds: float, sound: bool) -> list[str]:
    """Return an FFmpeg command for a live test picture in H.264 and, with ``sound``, a tone."""
    inputs = ["-re", "-f", "lavfi", "-i", f"testsrc2=size={size}:rate=25:duration={seconds:g}"]
    if sound:
        inputs += ["-re", "-f", "lavfi", "-i", f"sine=sample_rate=48000:duration={seconds:g}", "-c:a", "aac"]
    encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "12", "-pix_fmt", "yuv420p"]
    return ["ffmpeg", "-v", "error", "-nostdin", *inputs, *encoder]


def rtmp_sender(port: int, *, sound: bool = False) -> Server:
    """Start FFmpeg, which publishes to ``rtmp://127.0.0.1:PORT/live/cam``."""
    return Server(*_pictures("160x120", 36000, sound), "-f", "flv", f"rtmp://127.0.0.1:{port}/live/cam")


def udp_sender(port: int, size: str = "160x120") -> Server:
    """Start FFmpeg, which sends an MPEG transport stream to a UDP port."""
    return Server(*_pictures(size, 36000, sound=False), "-f", "mpegts", f"udp://127.0.0.1:{port}?pkt_size=1316")


def http_sender(port: int, size: str = "160x120", *, seconds: float = 36000, sound: bool = False) -> Server:
    """Start FFmpeg, which serves one client MPEG-TS at ``http://127.0.0.1:PORT/live.ts``, then exits."""
    return Server(*_pictures(size, seconds, sound), "-f", "mpegts", "-listen", "1", f"http://127.0.0.1:{port}/live.ts")


def motion_jpeg_sender(port: int, rate: int) -> Server:
    """Start FFmpeg, which serves one client Motion JPEG, as many cameras do, at ``http://127.0.0.1:PORT/live``."""
    camera = ["-re", "-f", "lavfi", "-i", f"testsrc2=size=160x120:rate={rate}"]
    jpegs = ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-f", "mpjpeg"]
    over_http = ["-content_type", "multipart/x-mixed-replace;boundary=ffmpeg", "-listen", "1"]
    return Server("ffmpeg", "-v", "error", "-nostdin", *camera, *jpegs, *over_http, f"http://127.0.0.1:{port}/live")


@contextlib.contextmanager
def hls_server(port: int, folder: Path) -> Iterator[Server]:
    """Serve a playlist of half-second segments at ``http://127.0.0.1:PORT/live.m3u8``; yields the sender."""
    pieces = ["-f", "hls", "-hls_time", "0.5", "-hls_list_size", "4", "-hls_flags", "delete_segments"]
    with (
        Server(*_pictures("160x120", 36000, sound=False), *pieces, folder / "live.m3u8") as sender,
        Server(sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "-d", folder, ready=port),
    ):
        until((folder / "live.m3u8").exists)
        yield sender


class Relay:
    """A UDP relay that drops packets at random or corrupts the video. As a context manager, it is closed at the end.

    Attributes:
        loss: The share of packets to drop.
        spoilt: Whether to corrupt the video, so that it cannot be decoded though its packets are intact.
        lost: The number of packets dropped so far.
    """

    def __init__(self, port: int, target: int, loss: float = 0.0) -> None:
        """Listen on ``port``, and send to ``target``."""
        self.loss, self.spoilt, self.lost = loss, False, 0
        self._target, self._random = ("127.0.0.1", target), random.Random(1)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", port))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relay")
        self._thread.start()

    def _work(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                packet = self._socket.recv(65536)
                if self._random.random() < self.loss:
                    self.lost += 1
                else:
                    self._socket.sendto(self._spoil_all(packet) if self.spoilt else packet, self._target)

    def _spoil_all(self, packet: bytes) -> bytes:
        """Corrupt the payload of the video's transport packets (FFmpeg gives them PID 256); headers stay intact."""
        parts = [packet[at : at + 188] for at in range(0, len(packet), 188)]
        return b"".join(self._spoil(part) if int.from_bytes(part[1:3]) & 0x1FFF == 256 else part for part in parts)

    def _spoil(self, part: bytes) -> bytes:
        head = 4 + (1 + part[4] if part[3] & 0x20 else 0)
        if part[1] & 0x40:  # the PES header, and 11 bytes in which H.264's parser finds the beginning of a frame
            head += 9 + part[head + 8] + 11
        return part[:head] + b"\2" * (len(part) - head)  # an invalid slice type

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


class Run:
    """A process of `petseg infer --json` and its events so far. As a context manager, it is killed at the end.

    Attributes:
        process: The process.
        events: The events, one for each line of stdout, so far.
        err: The text on stderr, after the process has ended.
    """

    def __init__(self, *words: object, keep_frames: bool = True) -> None:
        """Start the process.

        Args:
            words: Sources and options.
            keep_frames: Keep the events of frames; otherwise they are only counted.
        """
        command = [sys.executable, "-m", "petseg.cli", "infer", *map(str, words), "--json"]
        self._keep_frames = keep_frames
        self.events: list[dict[str, Any]] = []
        self.times: list[float] = []  #: when each event arrived, ``time.monotonic()``
        self.last: dict[str, dict[str, Any]] = {}  #: the last frame event of each source
        self.counts: dict[str, int] = {}  #: the number of frame events of each source
        self.err = ""
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._threads = [threading.Thread(target=read) for read in (self._read_events, self._read_err)]
        for thread in self._threads:
            thread.start()

    def _read_events(self) -> None:
        for line in self.process.stdout or ():
            event = json.loads(line)
            if event["event"] == "frame":
                name = event["input"]
                self.last[name], self.counts[name] = event, self.counts.get(name, 0) + 1
                if not self._keep_frames:
                    continue
            self.times.append(time.monotonic())
            self.events.append(event)

    def _read_err(self) -> None:
        self.err = self.process.stderr.read() if self.process.stderr else ""

    def states(self, name: str = "") -> list[str]:
        """Return the states so far of the sources whose name contains a text."""
        events = [e for e in list(self.events) if e["event"] == "state" and name in e["input"]]
        return [event["state"] for event in events]

    def frames(self, name: str = "") -> int:
        """Return how many frames have been written so far."""
        return sum(count for source, count in list(self.counts.items()) if name in source)

    def more_frames(self, count: int = 5, name: str = "") -> None:
        """Wait for so many more frames."""
        before = self.frames(name)
        until(lambda: self.frames(name) >= before + count)

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 40) -> int:
        """Wait for the end, and return the exit code."""
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        return code

    def report(self, name: str = "") -> dict[str, Any]:
        """Return the final event of a source, after asserting that every frame is accounted for."""
        (report,) = (e for e in self.events if e["event"] == "video" and name in e["input"])
        frames = report["frames"]
        assert frames["decoded"] == report["written"] + frames["dropped"] + frames["failed"], report
        assert report["written"] == self.frames(name), report
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
