"""``petseg infer``: photos in, masks and cutouts out."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import (
    BACKEND,
    HELP,
    NAME,
    PATH,
    SCHEMA_VERSION,
    SECONDS,
    SHARE,
    UNIT,
    Finite,
    parse_size,
)
from petseg_runtime.errors import EXIT_PARTIAL, InputError, OutputError, UsageError
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg_runtime.batch import Done, Report
    from petseg_runtime.cli.infer_video import Output, Videos
    from petseg_runtime.pipeline import Outcome
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import Sink
    from petseg_runtime.sources import Item, Origin

__all__ = ["infer"]

#: Without meaning for photos.
VIDEO_OPTIONS = ("start", "stride", "max_frames", "smooth", "segment", "no_audio", "policy", "stall", "give_up")


@click.command()
@click.argument("sources", nargs=-1, required=True, type=NAME, metavar="SOURCE...")
@click.option("--model", type=PATH, help="A file that `petseg export` made.  [default: the one that ships]")
@click.option("--output", type=PATH, help="Folder for the results; - is stdout.  [default: petseg-output/KIND]")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["mask", "probability", "cutout", "overlay", "background", "coco-polygons", "coco-rle", "lines"]),
    help="What to write; COCO is one file for all photos, lines is one of JSON for each frame.  [default: cutout]",
)
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "webp", "mp4", "webm"]),
    help="Of pictures and videos; png of a video: a picture for each frame.  [default: what is usual for the kind]",
)
@click.option(
    "--background", type=NAME, metavar="COLOUR|FILE", help="What to put behind the pet: white, '#00ff00', beach.jpg."
)
@click.option(
    "--threshold", type=UNIT, help="Of masks: pet from this probability on, 0 to 1.  [default: the model's own]"
)
@click.option(
    "--cutout-threshold",
    type=UNIT,
    help="Of cutouts and backgrounds: half transparent at this probability, 0 to 1.  [default: the model's own]",
)
@click.option("--min-area", type=SHARE, default=0.0, help="Drop regions below this share of the picture, 0 to 1.")
@click.option("--only-found", is_flag=True, help="Photos: write nothing where no pet is found.")
@click.option(
    "--fast-decode",
    is_flag=True,
    help="Decode large JPEGs at a reduced size where only masks are written: faster, and the masks differ a little.",
)
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help=HELP["backend"])
@click.option("--device", default="auto", show_default=True, help=HELP["device"])
@click.option(
    "--size",
    metavar="HxW",
    help="Size of the model's input, if it was exported with --dynamic-size.  [default: the model's own]",
)
@click.option("--threads", type=click.IntRange(min=1), help=HELP["threads"])
@click.option("--resume", is_flag=True, help="Go on with a run over several files that was stopped.")
@click.option("--start", type=Finite(0), help="Videos: seconds to pass over.")
@click.option("--stride", type=click.IntRange(min=1), help="Videos: use every Nth frame.")
@click.option("--max-frames", type=click.IntRange(min=1), help="Videos: stop after this many frames.")
@click.option(
    "--smooth",
    type=SHARE,
    help="Videos: against flicker, 0 to 1: how much of a still place's past stays after 1/30 s; 0.85 is a good start.",
)
@click.option("--segment", type=SECONDS, help="Videos: begin a new file after this many seconds.")
@click.option("--no-audio", is_flag=True, help="Videos: leave the sound out.")
@click.option(
    "--policy",
    type=click.Choice(["block", "drop-oldest", "latest"]),
    help="Frames that come too fast wait, replace the oldest, or only the newest waits.  "
    "[default: block for files, drop-oldest for streams]",
)
@click.option(
    "--stall", type=SECONDS, help="Streams: reconnect after this many seconds without a frame.  [default: 10]"
)
@click.option(
    "--give-up",
    type=SECONDS,
    help="Streams: give up after this many seconds without a frame.  [default: 30 until the first one, then never]",
)
@click.option(
    "--input-option", multiple=True, metavar="NAME=VALUE", help="Streams: for FFmpeg, like rtsp_transport=udp."
)
@click.option("--raw", metavar="WxH@RATE[:FORMAT]", help="Standard input is raw frames, rgb24 unless said otherwise.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo or frame on stdout, then a summary.")
@click.option("-v", "--verbose", is_flag=True, help="Say what runs it, and what each step took.")
@click.option("-q", "--quiet", is_flag=True, help=HELP["quiet"])
def infer(
    sources: tuple[str, ...],
    output: Path | None,
    kind: str | None,
    background: str | None,
    only_found: bool,
    fast_decode: bool,
    resume: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    raw: str | None,
    input_option: tuple[str, ...],
    **options: Any,
) -> int:
    """Segment photos, videos and streams.

    A SOURCE is a file, a folder with its sub-folders, a pattern ('photos/**/*.jpg'), a camera (0, /dev/video0), a URL
    (rtsp, rtmp, http, udp, ...) or - for standard input, whose result goes to standard output.

    What cannot be used is named, counted and passed over. Ctrl-C, SIGTERM and the end of the
    terminal stop a run in order: videos that were begun can be played, no half-written photo is left, and --resume
    continues.
    Exit code 0: all done; 3: some failed; 1: all failed; 130, 143, 129: stopped by Ctrl-C, SIGTERM or SIGHUP, and no
    live source has failed.
    """
    from petseg_runtime.batch import segment_photos
    from petseg_runtime.journal import Journal
    from petseg_runtime.sinks import KINDS, background_of, probe
    from petseg_runtime.sources import RESULTS

    kind = kind or ("background" if background else "cutout")
    to_stdout = output == Path("-") or (sources == ("-",) and output is None)
    folder = None if to_stdout else output or Path(RESULTS) / kind
    coco = kind.startswith("coco")
    if folder is None and (as_json or resume or coco or kind == "lines"):
        raise UsageError(
            "a picture goes to standard output: for --json, --resume, COCO or lines, give a folder with --output"
        )
    if folder is None and sys.stdout is None:
        raise OutputError("standard output is closed: give a folder with --output")
    form = options.pop("format")
    of_video = {name: options.pop(name) for name in VIDEO_OPTIONS}
    found = _find(sources, folder, raw, _pairs(input_option), quiet)
    found = _without_videos(found, _no_video(kind, form, only_found), quiet)
    given = of_video | {"input_option": input_option, "only_found": only_found}
    _check(found, given, kind, form, background)
    _check_masks(found, kind, options["threshold"], options["cutout_threshold"], fast_decode)
    looks = {"as": kind, "format": form, "background": None if background is None else background_of(background)}
    made = _made(found, folder, looks, of_video, resume) if found.streams else None
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(_segmenter(len(found.photos), quiet, **options))
        _tell(segmenter, verbose, quiet)
        videos = _videos(segmenter, made, of_video, (as_json, quiet, verbose)) if made else None
        # Makes the folder, so not before there is something to write.
        sink = _sink(found, folder, resume, only_found, **looks) if found.photos else None
        journal = None
        # Of one photo that was searched for, too: the next search must know the result for what it is.
        if folder and not found.live and (resume or _searched(sources) or len(found.items) > 1 or coco):
            settings = _looks(kind, looks, found) | _settings(segmenter)
            settings |= {name: of_video[name] or None for name in VIDEO_OPTIONS}
            settings |= {"fast_decode": fast_decode, "only_found": only_found or None}
            probe(folder)
            journal = stack.enter_context(Journal(folder, settings, resume=resume))
        report = None
        if sink:
            watch = stack.enter_context(_watcher(len(found.photos), as_json, quiet, folder is not None))
            report = segment_photos(
                found.photos,
                segmenter,
                sink,
                watch,
                journal=journal,
                mask_only=not KINDS[kind].needs_photo,
                fast_decode=fast_decode,
                spare=KINDS[kind].spare,
            )
        items = {str(item.name): item for item in found.videos}
        stopped = videos.run(found.streams, items, journal) if videos else None
    _print_report(report, videos, folder, as_json, verbose, quiet)
    failed = (len(report.failed) if report else 0) + (len(videos.failed) if videos else 0)
    done = (report.done + report.skipped if report else 0) + (videos.done + videos.skipped if videos else 0)
    if videos and (code := videos.problem_code()) is not None:
        return code
    if stopped is not None:
        return stopped
    return 0 if not failed else EXIT_PARTIAL if done else InputError.exit_code


def _searched(sources: Sequence[str]) -> bool:
    """Whether files are found in folders, not all named."""
    return any(
        os.path.isdir(source)  # noqa: PTH112 - of a text too long for a name, Path.is_dir raises
        or (glob.has_magic(source) and "://" not in source and not os.path.lexists(source))
        for source in sources
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the sources are.

    Attributes:
        photos: Files, and a photo on standard input.
        videos: Files.
        streams: These, a video on standard input, cameras and network streams.
    """

    photos: list[Item]
    videos: list[Item]
    streams: list[Origin]

    @property
    def items(self) -> list[Item]:
        return self.photos + self.videos

    @property
    def live(self) -> bool:
        return any(origin.endless for origin in self.streams)

    @property
    def remote(self) -> bool:
        """Whether FFmpeg opens more than local files."""
        return any(origin.options is not None and isinstance(origin.target, str) for origin in self.streams)


def _find(sources: Sequence[str], folder: Path | None, raw: str | None, options: dict[str, str], quiet: bool) -> _Found:
    """Tell photos, videos and streams apart.

    Raises:
        InputError: There is nothing.
        UsageError: Standard input is asked for twice, more than one result for standard output, or what is live
            together with what has an end.
    """
    from petseg_runtime.sources import (
        IMAGE_SUFFIXES,
        STDIN,
        VIDEO_SUFFIXES,
        Origin,
        find_photos,
        from_pipe,
        is_video,
        raw_video,
        stream_origin,
    )

    named = [stream_origin(text, options) for text in sources]
    streams = [origin for origin in named if origin]
    paths = [Path(text) for text, origin in zip(sources, named, strict=True) if not origin]
    pipe: bytes | None = None
    if raw or paths.count(STDIN) == 1:
        if raw and paths.count(STDIN) != 1:
            raise UsageError("--raw says what comes on standard input: give - as a source, once")
        origin, pipe = (raw_video(raw), b"") if raw else from_pipe()
        if origin:
            streams.append(origin)
            paths.remove(STDIN)
    told: list[str] = []
    items = find_photos(paths, folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES, pipe, told.append)
    photos: list[Item] = []
    videos: list[Item] = []
    for item in items:
        (videos if is_video(item) else photos).append(item)
    if videos and all(item.problem and item.source.suffix.lower() not in IMAGE_SUFFIXES for item in photos):
        videos += photos  # folders that cannot be listed and patterns that fit nothing, among videos alone
        photos = []
    streams[:0] = [Origin(str(video.source), str(video.source), video.name) for video in videos]
    if not items and not streams:
        raise InputError("; ".join([f"no photos or videos in {', '.join(sources)}", *told]))
    for what in told:
        _say(what, quiet)
    found = _Found(photos, videos, _distinct(streams))
    if folder is None and len(found.photos) + len(found.streams) > 1:
        raise UsageError("one result at a time goes to standard output: for more, give a folder with --output")
    if (found.live and not all(origin.endless for origin in found.streams)) or (found.live and found.photos):
        raise UsageError("live sources run until they are stopped: give photos and videos to another run")
    return found


def _distinct(origins: list[Origin]) -> list[Origin]:
    """No two of one name: cameras at the same address differ in what their names do not show."""
    from petseg_runtime.sources import distinct

    names = distinct(origin.name for origin in origins)
    return [dataclasses.replace(origin, name=name) for origin, name in zip(origins, names, strict=True)]


def _check(found: _Found, given: dict[str, Any], kind: str, format: str | None, background: str | None) -> None:  # noqa: A002
    """Refuse what cannot be, before anything is loaded.

    Raises:
        UsageError: The kind, the format and the background do not fit together, or not to the sources; or an option is
            for sources of which there is none.
    """
    from petseg_runtime.sinks import KINDS, check_looks

    if found.photos or not found.streams:
        if kind == "lines":
            raise UsageError("lines are of videos; for photos, --json prints the same")
        check_looks(kind, format, background)
    if found.streams:
        if why := _no_video(kind, format, given["only_found"]):
            raise UsageError(f"{found.streams[0].shown}: {why}; give videos and streams to another run")
        if kind in KINDS:
            check_looks(kind, None, background)
    for what, names, there in (
        ("videos and streams", VIDEO_OPTIONS, bool(found.streams)),
        ("cameras and streams", ("give_up",), found.live),
        ("cameras, streams and other URLs", ("stall", "input_option"), found.remote),
        ("what has an end", ("start",), not found.live),
    ):
        if not there and (unused := [name for name in names if given[name]]):
            raise UsageError(f"--{unused[0].replace('_', '-')} is for {what}, and there is none")


def _check_masks(
    found: _Found, kind: str, threshold: float | None, cutout_threshold: float | None, fast_decode: bool
) -> None:
    """Refuse what would have no effect on this kind of result.

    Raises:
        UsageError: It would have none; says what would.
    """
    from petseg_runtime.sinks import KINDS

    cut_out = kind in ("cutout", "background")
    if cut_out and threshold is not None and cutout_threshold is None:
        raise UsageError(
            f"--threshold is for masks, and a {kind} has --cutout-threshold (with both, --threshold is what counts "
            "as pet, for --json and --min-area)"
        )
    if cutout_threshold is not None and not cut_out:
        raise UsageError(f"--cutout-threshold is for cutouts and backgrounds; {kind} has --threshold")
    if fast_decode and (not found.photos or kind not in KINDS or KINDS[kind].needs_photo):
        alone = ", ".join(name for name, one in KINDS.items() if not one.needs_photo)
        raise UsageError(f"--fast-decode is for photos of which only the mask is written (--as {alone})")


def _no_video(kind: str, format: str | None, only_found: bool) -> str | None:  # noqa: A002
    """Why no video can become what is asked for, and what it can become; None: it can."""
    from petseg_runtime.sinks import VIDEO_FORMATS

    if only_found:
        return "--only-found is for photos"
    formats = VIDEO_FORMATS.get(kind, ())
    if not formats:
        return f"{kind} is of photos; a video can be: {', '.join(VIDEO_FORMATS)}"
    if format and format not in formats:
        files = ", ".join(name for name in formats if name != "raw")  # which is for --output - only
        return f"{kind} of a video is not written as {format}; it can be: {files}"
    return None


def _without_videos(found: _Found, why: str | None, quiet: bool) -> _Found:
    """Pass over videos that cannot become what is asked for, where they were found beside photos, and not named."""
    strays = [item for item in found.videos if item.found]
    if why is None or not strays or not found.photos:
        return found
    more = f" and {len(strays) - 1} more videos" if len(strays) > 1 else ""
    _say(f"passed over {strays[0].source}{more}: {why}", quiet)
    kept = [not item.found for item in found.videos]
    kept += [True] * (len(found.streams) - len(kept))  # the videos come first
    videos = [item for item in found.videos if not item.found]
    return _Found(found.photos, videos, list(itertools.compress(found.streams, kept)))


def _made(found: _Found, folder: Path | None, looks: dict[str, Any], given: dict[str, Any], resume: bool) -> Output:
    """What is made of the videos, and where.

    Raises:
        UsageError: It cannot be made of them.
        OutputError: It cannot go there, or would replace something.
    """
    from petseg_runtime.cli.infer_video import Output, check_places
    from petseg_runtime.sinks import KINDS, VIDEO_FORMATS
    from petseg_runtime.video.movie import MOVIES

    kind, asked = str(looks["as"]), looks["format"]
    if folder is None and asked:
        raise UsageError(f"raw frames go to standard output, not {asked}: give a folder with --output")
    form = asked or (VIDEO_FORMATS[kind][0] if folder else "raw")
    if given["segment"] and form not in (*MOVIES, "ndjson"):
        raise UsageError(f"--segment is for movies ({', '.join(MOVIES)}) and lines, not {form}")
    if resume and found.live:
        raise UsageError("--resume is for files: a stream's results are numbered on, and nothing is replaced")
    output = Output(
        folder=folder,
        kind=kind,
        format=form,
        background=looks["background"],
        segment=given["segment"],
        audio=not given["no_audio"],
    )
    suffix = asked or next(iter(KINDS[kind].formats), "") if kind in KINDS else ""
    photos = {str(i.source): str(folder / i.name) + f".{suffix}" for i in found.photos} if folder else {}
    return check_places(output, found.streams, photos, resume=resume)


def _videos(segmenter: Segmenter, made: Output, given: dict[str, Any], told: tuple[bool, bool, bool]) -> Videos:
    from petseg_runtime.cli.infer_video import Videos
    from petseg_runtime.video.stream import Reading

    reading = Reading(
        start=given["start"] or 0.0,
        stride=given["stride"] or 1,
        max_frames=given["max_frames"],
        policy=given["policy"],
        stall=given["stall"] or 10.0,
        patience=given["give_up"],
        smooth=given["smooth"] or 0.0,
    )
    return Videos(segmenter, made, reading, *told)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{text!r}: NAME=VALUE is expected", param_hint="--input-option")
        pairs[name] = value
    return pairs


def _sink(found: _Found, folder: Path | None, resume: bool, only_found: bool, **looks: Any) -> Sink:
    """Where the results go."""
    from petseg_runtime.sinks import OnlyFound

    sink = _sink_of_all(found, folder, resume, **looks)
    return OnlyFound(sink) if only_found else sink


def _sink_of_all(found: _Found, folder: Path | None, resume: bool, **looks: Any) -> Sink:
    from petseg_runtime import sinks
    from petseg_runtime.journal import JOURNAL

    kind = str(looks.pop("as"))
    # Without a journal, no run was here, and what lies there is not its own.
    resume = resume and folder is not None and (folder / JOURNAL).exists()
    if folder and not sinks.KINDS[kind].formats:
        return sinks.CocoSink(folder, kind, found.items, resume=resume)
    picture = sinks.picture(kind, **looks)
    if folder is None:
        return sinks.StreamSink(sys.stdout.buffer, picture)
    return sinks.ImageSink(folder, picture, found.photos, beside=found.videos, resume=resume)


def _segmenter(photos: int, quiet: bool, threads: int | None, size: str | None, **options: Any) -> Segmenter:
    from petseg_runtime.host import usable_cpus
    from petseg_runtime.segmenter import Segmenter

    told = []

    def tell(what: str) -> None:
        told.append(what)
        _say(what, quiet)

    segmenter = Segmenter(
        **options,
        threads=threads,
        streams=max(1, min(threads or usable_cpus(), photos)),
        size=None if size is None else parse_size(size),
        tell=tell,
    )
    for note in segmenter.describe().notes:
        if note not in told:
            _say(note, quiet)
    return segmenter


def _looks(kind: str, looks: dict[str, Any], found: _Found) -> dict[str, Any]:
    """What is asked of the results' looks, as it is meant: with the usual formats, and the background itself."""
    from petseg_runtime.sinks import KINDS, VIDEO_FORMATS

    background = looks["background"]
    asked: dict[str, Any] = {"as": kind, "background": background}
    if found.photos and kind in KINDS:
        asked["format"] = looks["format"] or next(iter(KINDS[kind].formats), None)
    if found.videos and kind in VIDEO_FORMATS:
        asked["video_format"] = looks["format"] or VIDEO_FORMATS[kind][0]
    if background is not None:
        asked["background"] = (
            list(background)
            if isinstance(background, tuple)
            else f"a picture, SHA-256 {hashlib.sha256(background.tobytes()).hexdigest()}"
        )
    return asked


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """What decides how results look, beside their kind."""
    engine = segmenter.describe()
    return {
        "model": segmenter.artifact.identity,
        "size": list(segmenter.size),
        "threshold": segmenter.threshold,
        "cutout_threshold": segmenter.cutout_threshold,
        "min_area": segmenter.min_area,
        "engine": f"{engine.name} {engine.version} on {engine.device}, {engine.precision}",
    }


def _tell(segmenter: Segmenter, verbose: bool, quiet: bool) -> None:
    engine, spec = segmenter.describe(), segmenter.artifact.spec
    if segmenter.size != (spec.height, spec.width):
        own, asked = f"{spec.height} x {spec.width}", "{} x {}".format(*segmenter.size)
        _say(f"--size {asked}: the model's own is {own}; at another its masks may be much worse", quiet)
    if verbose:
        click.echo(
            f"{shown(spec.name)} in {engine.name} {engine.version} on {engine.device}, "
            f"{engine.precision}, {engine.threads} threads",
            err=True,
        )


def _say(note: str, quiet: bool) -> None:
    if not quiet:
        click.echo(f"petseg: {shown(note)}", err=True)


class _watcher:  # noqa: N801 (used like a function)
    """Prints what becomes of each photo; a progress bar where people watch a batch."""

    def __init__(self, total: int, as_json: bool, quiet: bool, to_files: bool) -> None:
        self._as_json, self._quiet, self._to_files = as_json, quiet, to_files
        self._progress: Any = None
        if total > 1 and sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import Progress

            # It would redirect what is printed, of which click writes a part past it; see `_print`.
            console = Console(stderr=True)
            self._progress = Progress(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._task = self._progress.add_task("segmenting", total=total)

    def __enter__(self) -> Callable[[Outcome[Item, Done]], None]:
        if self._progress:
            self._progress.start()
        return self._watch

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def _watch(self, outcome: Outcome[Item, Done]) -> None:
        source, done = shown(outcome.source.source), outcome.value
        if done is None:
            self._print(f"petseg: {shown(outcome.error)}", err=True)
        else:
            for note in () if self._quiet else done.notes:
                self._print(f"petseg: {source}: {note}", err=True)
            if self._to_files and not self._as_json and not self._quiet:
                self._print(f"{source}{_became(done)}")
            elif done.left_out and not self._to_files and not self._quiet:  # an empty standard output says too little
                self._print(f"petseg: {source}: no pet: nothing written", err=True)
        if self._as_json:
            self._print(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)

    def _print(self, line: str, err: bool = False) -> None:
        """Print a line; above the bar, where both are seen on one terminal."""
        if self._progress and (err or (sys.stdout is not None and sys.stdout.isatty())):
            self._progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line, err=err)


def _became(done: Done) -> str:
    """What became of a photo, for people."""
    if done.left_out:
        return "  no pet: nothing written"
    where = f" -> {shown(done.path)}" if done.path else ""
    return f"{where}  " + (f"{100 * done.coverage:.0f} % pet" if done.found else "no pet, it seems")


def _record(outcome: Outcome[Item, Done]) -> dict[str, Any]:
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "input": str(outcome.source.source)}
    if outcome.value is None:
        return {**record, "event": "failure", "error": str(outcome.error)}
    done = dataclasses.asdict(outcome.value)
    path, value = done.pop("path"), done.pop("value")
    done["coverage"] = round(done["coverage"], 6)
    annotation = {"annotation": value["annotation"]} if value else {}
    return {**record, "event": "result", "output": path and str(path), **done, **annotation}


def _print_report(
    report: Report | None, videos: Videos | None, folder: Path | None, as_json: bool, verbose: bool, quiet: bool
) -> None:
    if as_json:
        of_photos, of_videos = _summary(report), {"videos": videos.summary()} if videos else {}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "event": "summary", **of_photos, **of_videos}))
        return
    if report:
        _print_photos(report, folder, verbose, quiet)
    if videos and not quiet and folder and len(videos.reports) + videos.skipped > 1:
        counts = videos.summary()
        words = {"done": "done", "skipped": "there already", "stopped": "stopped", "failed": "failed"}
        click.echo(f"{counts['count']} videos: " + ", ".join(f"{counts[n]} {w}" for n, w in words.items() if counts[n]))


def _summary(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {}
    total = report.done + len(report.failed) + report.skipped
    counts = {"photos": total, "done": report.done, "failed": len(report.failed), "skipped": report.skipped}
    counts["left_out"] = report.left_out
    timing = {"seconds": round(report.seconds, 4), "steps": report.steps}
    return {**counts, **timing, **({"output": str(report.path)} if report.path else {})}


def _print_photos(report: Report, folder: Path | None, verbose: bool, quiet: bool) -> None:
    total = report.done + len(report.failed) + report.skipped
    if folder and not quiet and (total > 1 or report.failed or verbose or report.path):
        failed = f", {len(report.failed)} failed" if report.failed else ""
        skipped = f", {report.skipped} there already" if report.skipped else ""
        left_out = f", {report.left_out} without a pet" if report.left_out else ""
        photos = "photo" if total == 1 else "photos"
        where = shown(report.path or folder)
        written = f"{report.done - report.left_out} written to {where}"
        click.echo(f"{total} {photos}: {written}{left_out}{skipped}{failed}{_took(report, verbose)}")
    if verbose:
        for step, seconds in report.steps.items():
            p50, p95 = 1e3 * seconds["p50"], 1e3 * seconds["p95"]
            click.echo(
                f"{step:>6}: median {p50:.1f} ms, 95 % below {p95:.1f} ms, {seconds['sum']:.2f} s in all", err=True
            )


def _took(report: Report, verbose: bool) -> str:
    worked = report.done + len(report.failed)
    return f" in {report.seconds:.2f} s ({worked / max(report.seconds, 1e-9):.1f} photos/s)" if verbose else ""
