"""Soak test of live sources: half an hour of scripted disconnects, freezes and size changes, with memory monitoring.

One `petseg infer` reads an RTSP, a UDP and an HTTP stream at once, and writes overlay videos in segments. The servers
run on the same machine. The RTSP and HTTP servers are killed and restarted; RTSP is frozen once; UDP loses one packet
in a hundred, and its frame size changes three times. The results are reported, good or bad.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import click

from benchmarks import records
from benchmarks.servers import Relay, Run, Server, free_port, http_sender, lacking, rtsp_server, udp_sender

#: Seconds: how long a killed server is down, how long one is frozen, and without a frame until petseg reconnects.
DOWN, FROZEN, STALL = 3.0, 30.0, 5.0
LOSS: Final = 0.01
SMALL, LARGE = "640x360", "960x540"
#: Minimum seconds between two samples of the process.
INTERVAL: Final = 5.0
#: Shares of the run: the warm-up, and the windows after it and at the end in which memory is compared. After about ten
#: minutes, the allocator has seen every frame size, segment and connection.
WARM_UP, WINDOW = 1 / 3, 0.1


@dataclass(frozen=True)
class Event:
    """A change to a source: ``kill``, ``start``, ``freeze``, ``thaw``, or a frame size to switch to."""

    at: float
    source: str
    what: str


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(min=1.5), default=30.0, show_default=True, help="Duration of the test."
)
@click.option(
    "--disconnects", type=click.IntRange(min=1), help="How often a server is killed.  [default: two a minute, up to 20]"
)
def soak(minutes: float, disconnects: int | None) -> None:
    """Run a soak test: live sources that are interrupted on purpose, with a record of memory, states and frames."""
    if reason := lacking("ffmpeg", "rtsp"):
        raise click.ClickException(reason)
    breaks = disconnects or min(20, max(2, round(2 * minutes)))
    script = plan(60 * minutes, breaks)
    with tempfile.TemporaryDirectory() as folder, _servers() as (servers, urls):
        words = ("--as", "overlay", "--segment", max(30, 2 * minutes), "--stall", STALL, "--output", folder)
        begun = time.monotonic()
        with Run(*urls.values(), *words, keep_frames=False) as run:
            samples = _run_script(script, servers, run, begun, 60 * minutes)
            asked = time.monotonic()
            code = run.end(signal.SIGINT, 60) if run.process.poll() is None else run.wait()
            ending = time.monotonic() - asked
        sources = [_source(name, url, run, script, begun) for name, url in urls.items()]
    about = {
        "minutes": minutes,
        "disconnects": breaks,
        "changes_of_size": 3,
        "packet_loss": LOSS,
        "frozen_seconds": FROZEN,
        "segment_seconds": max(30, 2 * minutes),
        "pictures": f"{SMALL} and {LARGE}, 25 frames/s",
    }
    ended = {"exit_code": code, "seconds_to_end": round(ending, 2), "stderr": run.err}
    values = {**about, **ended, "memory": memory(samples), "sources": sources, "samples": thinned(samples)}
    path = records.write("soak", f"python -m benchmarks soak --minutes {minutes:g} --disconnects {breaks}", values)
    _print_summary(values, path)


def plan(seconds: float, breaks: int) -> list[Event]:
    """Return the script of events, spread over the time except its last part, so that all sources can come back."""
    usable = seconds - FROZEN / 2
    frozen = 0.4 * usable
    events = [Event(frozen, "rtsp", "freeze"), Event(frozen + FROZEN, "rtsp", "thaw")]
    events += [Event(usable * part, "udp", size) for part, size in ((0.25, LARGE), (0.5, SMALL), (0.75, LARGE))]
    for number in range(breaks):
        at = usable * (number + 0.5) / breaks
        busy = frozen - DOWN < at < frozen + FROZEN + 2 * STALL
        source = "http" if number % 2 or busy else "rtsp"
        events += [Event(at, source, "kill"), Event(at + DOWN, source, "start")]
    return sorted(events, key=lambda event: event.at)


@contextlib.contextmanager
def _servers() -> Iterator[tuple[dict[str, Server], dict[str, str]]]:
    """Start the servers; yield them and the addresses of their streams."""
    ports = {"rtsp": free_port(), "http": free_port()}
    relayed, udp = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    urls = {
        "rtsp": f"rtsp://127.0.0.1:{ports['rtsp']}/live",
        "udp": f"udp://127.0.0.1:{udp}",
        "http": f"http://127.0.0.1:{ports['http']}/live.ts",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(Relay(relayed, udp, LOSS))
        servers = {
            "rtsp": rtsp_server(ports["rtsp"], SMALL),
            "http": http_sender(ports["http"], SMALL, sound=True),
            f"udp {SMALL}": udp_sender(relayed, SMALL),
            f"udp {LARGE}": udp_sender(relayed, LARGE),
        }
        servers[f"udp {LARGE}"].stop()  # until the script switches to it
        for server in servers.values():
            stack.callback(server.stop)
        yield servers, urls


def _run_script(
    script: list[Event], servers: dict[str, Server], run: Run, begun: float, seconds: float
) -> list[dict[str, float]]:
    """Carry out the script, and sample the process all the while."""
    samples: list[dict[str, float]] = []
    waiting = list(script)
    while time.monotonic() - begun < seconds and run.process.poll() is None:
        now = time.monotonic() - begun
        if waiting and waiting[0].at <= now:
            event = waiting.pop(0)
            click.echo(f"{now:6.0f} s  {event.source}: {event.what}", err=True)
            _apply(event, servers)
        elif not samples or now - samples[-1]["at"] >= INTERVAL:
            with contextlib.suppress(OSError):  # the process has just ended
                samples.append({"at": round(now, 1), **sample(run.process.pid), "frames": run.frames()})
        else:
            time.sleep(0.2)
    return samples


def _apply(event: Event, servers: dict[str, Server]) -> None:
    server = servers.get(event.source)
    if server is None:  # the event is a frame size: switch to the sender of that size
        for size in (SMALL, LARGE):
            servers[f"{event.source} {size}"].stop()
        servers[f"{event.source} {event.what}"].start()
        return
    {"kill": server.stop, "start": server.start, "freeze": server.freeze, "thaw": server.thaw}[event.what]()


def sample(process: int) -> dict[str, float]:
    """Return a process's memory in megabytes, threads, and open files."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    values = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mb": round(int(values["VmRSS"].split()[0]) * 1024 / 1e6, 1),
        "threads": int(values["Threads"]),
        "files": len(os.listdir(f"/proc/{process}/fd")),  # noqa: PTH208 (Path.iterdir would give objects to count)
    }


def memory(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Summarize memory, threads and open files: after the warm-up, at the end (medians of a tenth), and the maximum."""
    if not samples:
        return {}
    end = samples[-1]["at"]
    early = [s for s in samples if WARM_UP * end <= s["at"] <= (WARM_UP + WINDOW) * end]
    late = [s for s in samples if s["at"] >= (1 - WINDOW) * end]
    steady = [s for s in samples if s["at"] >= WARM_UP * end]
    found: dict[str, Any] = {"warm_up_seconds": round(WARM_UP * end)}
    for what in ("rss_mb", "threads", "files"):
        first, last = (statistics.median(s[what] for s in part) for part in (early or samples, late))
        found[what] = {"after_warm_up": first, "at_the_end": last, "max": max(s[what] for s in steady)}
    rss = found["rss_mb"]
    rss["drift_percent"] = round(100 * (rss["at_the_end"] / rss["after_warm_up"] - 1), 2)
    if len(steady) > 2:
        line = statistics.linear_regression([s["at"] for s in steady], [s["rss_mb"] for s in steady])
        rss["slope_mb_per_hour"] = round(3600 * line.slope, 2)
    return found


def thinned(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return at most 120 of the samples, for the record."""
    return samples[:: -(-len(samples) // 120)] if samples else []


def _source(name: str, url: str, run: Run, script: list[Event], begun: float) -> dict[str, Any]:
    """Return the results of one source; ``report`` is None if the command printed none."""
    states = [(at - begun, e) for at, e in zip(run.times, run.events, strict=True) if e["event"] == "state"]
    mine = [(at, e) for at, e in states if e["input"] == url]
    report = next((e for e in run.events if e["event"] == "video" and e["input"] == url), None)
    live = [at for at, e in mine if e["state"] == "live"]
    restarts = [event.at for event in script if event.source == name and event.what in ("start", "thaw")]
    back = [next((round(at - restart, 2) for at in live if at > restart), None) for restart in restarts]
    about = {
        "source": name,
        "states": dict(Counter(e["state"] for _, e in mine)),
        "reasons": dict(Counter(e["reason"] for _, e in mine if e.get("reason"))),
        "attempts": max((e.get("attempt", 0) for _, e in mine), default=0),
        "seconds_until_live_again": back,
        "frame_events": run.counts.get(url, 0),
        "last_frame_time": run.last.get(url, {}).get("time"),
    }
    if report is None:
        return {**about, "report": None, "accounted": False}
    paths, frames = [Path(path) for path in report["paths"]], report["frames"]
    packets, sizes = _frames_and_sizes(paths)
    return {
        **about,
        "connections": report["connections"],
        "frames": frames,
        "written": report["written"],
        "undecodable": report["undecodable"],
        "error": report["error"],
        "files": len(paths),
        "files_mb": round(sum(path.stat().st_size for path in paths) / 1e6),
        "frames_in_files": packets,
        "sizes": sizes,
        "steps": report["steps"],
        "accounted": frames["decoded"] == report["written"] + frames["dropped"] + frames["failed"],
        "all_in_files": packets == report["written"] == run.counts.get(url, 0),
    }


def _frames_and_sizes(paths: list[Path]) -> tuple[int, list[str]]:
    """Count the frames in video files, and list their frame sizes in order."""
    count = 0
    sizes: list[str] = []
    for path in paths:
        with av.open(str(path)) as movie:
            picture = movie.streams.video[0]
            size = f"{picture.width}x{picture.height}"
            sizes += [] if sizes[-1:] == [size] else [size]
            count += sum(packet.size > 0 for packet in movie.demux(picture))
    return count, sizes


def _print_summary(values: dict[str, Any], path: Path) -> None:
    """Print a summary."""
    if rss := values["memory"].get("rss_mb"):
        click.echo(
            f"memory: {rss['after_warm_up']:.0f} MB after the warm-up, {rss['at_the_end']:.0f} MB at the end "
            f"({rss['drift_percent']:+.1f} %), {rss['max']:.0f} MB at most"
        )
    click.echo(f"exit code {values['exit_code']}, {values['seconds_to_end']} s to end")
    for source in values["sources"]:
        lost = "no report"
        if frames := source.get("frames"):
            lost = f"{frames['decoded']} decoded, {frames['dropped']} dropped, {frames['failed']} failed"
        states = ", ".join(f"{count} x {state}" for state, count in source["states"].items()) or "none"
        good = source["accounted"] and source.get("all_in_files")
        click.echo(
            f"{source['source']}: frames: {source['frame_events']} written, {lost}, "
            f"{'all accounted for' if good else 'NOT ALL ACCOUNTED FOR'}; states: {states}"
        )
    click.echo(str(path))
