"""Every frame is accounted for, in order, whatever ends the stream; drops follow the policy; memory is bounded."""

from __future__ import annotations

import collections
import gc
import itertools
import math
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petseg_runtime.errors import EngineError, UnreadableVideo, UsageError
from petseg_runtime.pipeline import Timings
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.video import stream as stream_module
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.sound import Sound, Track
from petseg_runtime.video.stream import _MAX_AUDIO_PACKETS, POLICIES, Counts, Reading, Segmented, Stream, _InputQueue


def picture(value: int, pixels: str = "gray") -> av.VideoFrame:
    frame = av.VideoFrame(32, 16, pixels)
    for plane in frame.planes:
        plane.update(bytes([value]) * plane.buffer_size)
    return frame


def frame_of(number: int, sound: list[Any] | None = None) -> Frame:
    return Frame(number, number, Fraction(1, 25), picture(number % 256), captured=time.monotonic(), sound=sound or [])


@dataclass
class Model:
    """Outputs the red channel of its input; as slow as the test wants."""

    batch: int = 1
    before: Callable[[], None] = lambda: None
    size: tuple[int, int] = (8, 8)
    threshold: float = 0.5
    cutout_threshold: float = 0.3
    certain_share: float = 0.25
    keep_doubtful: bool = True
    min_area: float = 0.0
    threads: int | None = None
    batches: list[int] = field(default_factory=list)

    def describe(self) -> Any:
        return SimpleNamespace(batch=self.batch, streams=1)

    finish = Segmenter.finish

    def infer(self, images: np.ndarray) -> np.ndarray:
        self.before()
        self.batches.append(len(images))
        return np.ascontiguousarray(images[..., 0])


class Source:
    """Frames from an iterator; remembers which thread closed it."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self.closed_by: str | None = None
        self.stopped = False

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed_by = threading.current_thread().name


def stream_of(frames: Any, model: Any = None, *, mask_only: bool = False, **reading: Any) -> Stream:
    return Stream(frames, model or Model(), Reading(**reading), mask_only=mask_only)


def numbers(segmented: list[Segmented]) -> list[int]:
    return [s.frame.number for s in segmented]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_file_loses_nothing_and_keeps_its_order(batch: int) -> None:
    source, model = Source(frame_of(n) for n in range(100)), Model(batch)
    with stream_of(source, model) as stream:
        done = list(stream)
    assert numbers(done) == list(range(100))
    assert [int(s.result.probability[0, 0]) for s in done] == list(range(100))
    assert stream.counts.decoded == stream.counts.delivered == 100
    assert stream.counts.dropped == stream.counts.failed == 0
    assert max(model.batches) <= batch
    assert sum(model.batches) == 100
    assert source.closed_by == "petseg-decode"  # closed by another thread, a decoder would crash
    assert not stream.stopped
    assert set(stream.timings.summary()) == {"decode", "convert", "infer", "finish", "latency"}


def test_results_have_the_frames_pixels_unless_only_the_mask_is_wanted() -> None:
    (segmented,) = stream_of([frame_of(7)])
    assert segmented.result.pixels is not None
    assert segmented.result.pixels.shape == (16, 32, 3)
    (segmented,) = stream_of([frame_of(7)], mask_only=True)
    assert segmented.result.pixels is None
    assert segmented.result.probability.shape == (16, 32)


def test_a_stride_takes_every_nth_frame_and_renumbers_them() -> None:
    done = list(stream_of([frame_of(n) for n in range(10)], stride=3))
    assert [s.frame.pts for s in done] == [0, 3, 6, 9]
    assert numbers(done) == [0, 1, 2, 3]


def broken(frames: list[Frame]) -> Iterator[Frame]:
    """A file that is damaged after these frames."""
    yield from frames
    raise UnreadableVideo("truncated", "clip.mp4")


@pytest.mark.parametrize(
    ("reading", "durations"),
    [
        ({}, [1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9, 10]),  # the last one alone
        ({"max_frames": 2}, [1 + 2 + 3, 3 * 4]),
        ({"max_frames": 4}, [1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9, 3 * 10]),
        ({"policy": "drop-oldest"}, [3 * 1, 3 * 4, 3 * 7, 3 * 10]),
    ],
    ids=str,
)
def test_with_a_stride_each_frame_stays_until_the_next(reading: dict[str, Any], durations: list[int]) -> None:
    """Where frames may not be held back until the next one is read, its duration is assumed."""
    frames = [replace(frame_of(number), duration=number + 1) for number in range(10)]
    assert [s.frame.duration for s in stream_of(frames, stride=3, **reading)] == durations


def test_with_a_stride_everything_before_damage_is_delivered() -> None:
    done = iter(stream_of(broken([replace(frame_of(n), duration=1) for n in range(8)]), stride=3))
    frames = [segmented.frame for segmented in itertools.islice(done, 3)]
    assert [(frame.number, frame.duration) for frame in frames] == [(0, 3), (1, 3), (2, 2)]
    with pytest.raises(UnreadableVideo):
        next(done)


def test_audio_of_frames_that_a_stride_skips_is_kept() -> None:
    sounds = [Sound(av.Packet(b"x"), Fraction(n)) for n in range(6)]
    done = list(stream_of([frame_of(n, [sounds[n]]) for n in range(6)], stride=3))
    assert [s.shift for d in done for s in d.frame.sound] == [0, 1, 2, 3]


def test_it_ends_after_so_many_frames() -> None:
    stream = stream_of((frame_of(n) for n in range(1000)), max_frames=5)
    assert numbers(list(stream)) == [0, 1, 2, 3, 4]
    assert stream.counts.decoded == 5


@pytest.mark.parametrize(
    ("late", "length", "policy", "read", "heard"),
    [
        pytest.param(25, 1000, "block", 36, range(11), id="until it is beyond the last frame"),
        pytest.param(-1, 1000, "block", 10, range(1, 11), id="it is beyond the last frame already"),
        pytest.param(25, 30, "block", 30, range(30), id="until the file ends"),
        pytest.param(100, 1000, "block", 62, [], id="no further than two seconds"),
        pytest.param(25, 1000, "latest", 10, [], id="a live source is not waited for"),
    ],
)
def test_audio_stored_after_later_frames_is_read(
    late: int, length: int, policy: str, read: int, heard: Sequence[int]
) -> None:
    """Each frame comes with the audio of ``late`` frames before it; ten frames are wanted."""
    taken: list[Frame] = []

    def sound(number: int) -> list[Sound]:
        packet: Any = av.Packet(b"x")
        packet.pts, packet.time_base = number, Fraction(1, 25)
        return [Sound(packet, Fraction(0))] if number >= 0 else []

    def frames() -> Iterator[Frame]:
        for number in range(length):
            taken.append(replace(frame_of(number, sound(number - late)), duration=1, track=Track(None, "aac")))
            yield taken[-1]

    source = Source(frames())
    source.rest = [one for number in range(length - late, length) for one in sound(number)]  # type: ignore[attr-defined]
    stream = stream_of(source, max_frames=10, policy=policy)
    delivered = [one for segmented in stream for one in segmented.frame.sound]
    assert [one.packet.pts for one in (*delivered, *stream.rest)] == list(heard)
    assert len(taken) == read
    assert stream.counts.decoded == 10


@pytest.mark.parametrize("policy", ["latest", "drop-oldest"])
def test_dropped_frames_of_a_live_source_are_counted(policy: str) -> None:
    begun, all_decoded = threading.Event(), threading.Event()

    def frames() -> Iterator[Frame]:
        yield frame_of(0)
        assert begun.wait(20)
        for number in range(1, 50):
            yield frame_of(number)
        all_decoded.set()

    def slow() -> None:
        begun.set()
        assert all_decoded.wait(20)

    stream = stream_of(frames(), Model(before=slow), policy=policy)
    done = numbers(list(stream))
    assert done[0] == 0
    assert done[-1] == 49  # the newest is never lost
    assert done == sorted(done)
    assert done == ([0, 49] if policy == "latest" else [0, *range(45, 50)])
    assert stream.counts.decoded == 50
    assert stream.counts.dropped == 50 - len(done)


def test_the_audio_of_a_dropped_frame_is_passed_on() -> None:
    begun, all_decoded = threading.Event(), threading.Event()
    sounds = [Sound(av.Packet(b"x"), Fraction(n)) for n in range(10)]

    def frames() -> Iterator[Frame]:
        yield frame_of(0, [sounds[0]])
        assert begun.wait(20)
        for number in range(1, 10):
            yield frame_of(number, [sounds[number]])
        all_decoded.set()

    def slow() -> None:
        begun.set()
        assert all_decoded.wait(20)

    done = list(stream_of(frames(), Model(before=slow), policy="latest"))
    assert [sound.shift for s in done for sound in s.frame.sound] == list(range(10))


@pytest.mark.parametrize("policy", ["latest", "drop-oldest"])
def test_a_stalled_consumer_gets_the_newest_audio(policy: str) -> None:
    """An hour of it would take a hundred megabytes."""
    queue, packet = _InputQueue(policy, 5, Counts()), av.Packet(b"x")
    for number in range(10_000):
        assert queue.put(frame_of(number, [Sound(packet, Fraction(number))]))
    kept = [sound.shift for frame in queue.take(5) for sound in frame.sound]
    assert _MAX_AUDIO_PACKETS <= len(kept) < _MAX_AUDIO_PACKETS + 5
    assert kept == list(range(10_000 - len(kept), 10_000))


def test_a_source_that_breaks_has_delivered_what_came_before() -> None:
    def frames() -> Iterator[Frame]:
        yield from (frame_of(n) for n in range(3))
        raise UnreadableVideo("clip.mp4: broken")

    stream = stream_of(frames())
    done: list[Segmented] = []
    with pytest.raises(UnreadableVideo, match="broken"):
        collections.deque(map(done.append, stream), maxlen=0)
    assert numbers(done) == [0, 1, 2]


def test_an_engine_that_fails_ends_the_stream_and_its_threads() -> None:
    def fail() -> None:
        raise EngineError("no memory")

    endless = (frame_of(n) for n in iter(int, 1))
    with stream_of(endless, Model(before=fail)) as stream, pytest.raises(EngineError, match="no memory"):
        list(stream)
    assert_no_threads()


def test_a_thread_that_cannot_start_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the number of threads is limited. At exit, Python closes the stream."""
    at_exit, start = [], threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "petseg-engine":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(stream_module.atexit, "register", at_exit.append)
    source = Source(iter([]))
    with pytest.raises(RuntimeError, match="can't start"):
        stream_of(source)
    at_exit[0]()
    assert source.closed_by == "petseg-decode"


def test_a_frame_that_cannot_be_converted_is_counted_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def pixels(self: Frame, *args: Any) -> np.ndarray:
        if self.pts == 1:
            raise UnreadableVideo("frames in odd: cannot be converted")
        return np.zeros((8, 8, 3) if len(args) > 1 else (16, 32, 3), np.uint8)

    monkeypatch.setattr(Frame, "pixels", pixels)
    stream = stream_of([frame_of(n) for n in range(3)])
    assert [s.frame.pts for s in stream] == [0, 2]
    assert stream.counts.failed == 1
    assert stream.counts.failure == "frames in odd: cannot be converted"
    assert stream.counts.decoded == stream.counts.delivered + stream.counts.failed


@pytest.mark.parametrize("at_full_size", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_audio_of_a_frame_that_cannot_be_converted_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, batch: int, at_full_size: bool
) -> None:
    def pixels(self: Frame, *args: Any) -> np.ndarray:
        if self.pts in (1, 2, 4, 9) and (len(args) == 1) == at_full_size:
            raise UnreadableVideo("frames in odd: cannot be converted")
        return np.zeros((8, 8, 3) if len(args) > 1 else (16, 32, 3), np.uint8)

    monkeypatch.setattr(Frame, "pixels", pixels)
    packets = [Sound(av.Packet(b"x"), Fraction(number)) for number in range(10)]
    stream = stream_of([frame_of(number, [packets[number]]) for number in range(10)], Model(batch))
    heard = {segmented.frame.pts: segmented.frame.sound for segmented in stream}
    assert heard[3] == packets[1:4]
    assert heard[5] == packets[4:6]
    assert [packet for sound in heard.values() for packet in sound] == packets[:9]
    assert stream.rest == packets[9:]


def test_a_frame_keeps_its_own_audio_however_much_that_is() -> None:
    """In a slide show, minutes of audio lie between two frames."""
    packets = [Sound(av.Packet(b"x"), Fraction(number)) for number in range(2 * _MAX_AUDIO_PACKETS)]
    (segmented,) = stream_of([frame_of(0, list(packets))])
    assert segmented.frame.sound == packets


def test_stop_delivers_what_was_decoded() -> None:
    source = Source(frame_of(n % 250) for n in iter(int, 1))
    with stream_of(source) as stream:
        done = []
        for segmented in stream:
            done.append(segmented)
            if len(done) == 10:
                threading.Thread(target=stream.stop).start()
    assert stream.stopped
    assert source.stopped
    assert stream.counts.decoded == stream.counts.delivered == len(done)


def test_a_stop_after_the_end_changes_nothing() -> None:
    """The source was read to its end and all of it is delivered, so it was not stopped."""
    with stream_of(frame_of(number) for number in range(3)) as stream:
        results = iter(stream)
        done = [next(results)]
        while not stream.whole:
            time.sleep(0.001)
        stream.stop()
        done += results
    assert numbers(done) == [0, 1, 2]
    assert not stream.stopped


def test_leaving_early_ends_the_threads() -> None:
    endless = (frame_of(n) for n in iter(int, 1))
    with stream_of(endless) as stream:
        assert next(iter(stream)).frame.number == 0
    assert_no_threads()


@pytest.mark.timeout(30)
def test_after_the_end_there_is_nothing_more() -> None:
    stream = stream_of([frame_of(0), frame_of(1)])
    assert numbers(list(stream)) == [0, 1]
    assert list(stream) == []
    left = stream_of(frame_of(n) for n in range(100))
    for _ in left:
        break
    left.close()
    assert list(left) == []
    with stream_of([frame_of(0)]) as closed:
        pass
    assert list(closed) == []


def test_a_closed_stream_is_freed() -> None:
    with stream_of([frame_of(0)]) as stream:
        assert numbers(list(stream)) == [0]
    closed = weakref.ref(stream)
    del stream
    gc.collect()
    assert closed() is None


@pytest.mark.timeout(30)
def test_another_thread_may_close_it() -> None:
    hang = threading.Event()

    def frames() -> Iterator[Frame]:
        yield frame_of(0)
        hang.wait(60)

    stream, seen = stream_of(frames()), []
    consumer = threading.Thread(target=lambda: seen.extend(numbers(list(stream))))
    consumer.start()
    until(lambda: stream.counts.delivered == 1)
    stream.close()
    consumer.join(timeout=10)
    assert not consumer.is_alive()
    assert seen == [0]
    hang.set()


@pytest.mark.timeout(30)
def test_a_callback_of_the_reading_thread_may_close_the_stream() -> None:
    """Closing must not wait for the calling thread."""
    begun = threading.Event()

    def frames() -> Iterator[Frame]:
        begun.wait(20)
        stream.close()
        yield frame_of(0)

    stream = stream_of(frames())
    begun.set()
    assert list(stream) == []
    assert_no_threads()


def test_a_source_that_hangs_does_not_keep_the_stream_from_ending() -> None:
    hang = threading.Event()

    def frames() -> Iterator[Frame]:
        yield frame_of(0)
        hang.wait(60)

    with stream_of(frames()) as stream:
        results = iter(stream)
        assert next(results).frame.number == 0
        stream.stop()
        assert next(results, None) is None
    hang.set()
    assert_no_threads()


def test_a_slow_consumer_bounds_what_is_decoded() -> None:
    decoded = []

    def frames() -> Iterator[Frame]:
        for number in range(1000):
            decoded.append(number)
            yield frame_of(number)

    with stream_of(frames()) as stream:
        results = iter(stream)
        next(results)
        until(lambda: len(decoded) > 5)
        time.sleep(0.05)
        assert len(decoded) < 20


#: Takes one frame of an endless source, and exits.
LEAVES = """
import atexit, functools, itertools, sys, threading, time
from fractions import Fraction
from types import SimpleNamespace
import av
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.video.stream import Reading, Stream
from petseg_runtime.video.frame import Frame

def infer(images):
    time.sleep(0.05)
    return images[..., 0]

alive = lambda: [thread.name for thread in threading.enumerate() if thread.name == "petseg-engine"]
atexit.register(lambda: print("at exit", *alive()))  # registered first, called last
model = SimpleNamespace(
    infer=infer, size=(8, 8), threshold=0.5, cutout_threshold=0.3, certain_share=0.25, min_area=0.0, keep_doubtful=True,
    threads=None, describe=lambda: SimpleNamespace(batch=1),
)
model.finish = functools.partial(Segmenter.finish, model)
frames = (Frame(n, n, Fraction(1, 25), av.VideoFrame(32, 16, "gray"), captured=0.0) for n in itertools.count())
results = iter(Stream(frames, model, Reading(policy=sys.argv[1])))
next(results)
print("before", *alive())
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_no_thread_is_in_the_engine_when_python_shuts_down(policy: str) -> None:
    """It would abort the process."""
    done = subprocess.run([sys.executable, "-c", LEAVES, policy], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "before petseg-engine\nat exit\n", "")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"policy": "newest"}, {"stride": 0}, {"max_frames": 0}, {"smooth": 1.0}, {"smooth": math.nan}),
        *({"stride": 1.5}, {"max_frames": 2.5}, {"stride": "2"}, {"max_frames": math.nan}),
        *({"start": 1e19}, {"stride": 10**20}),  # FFmpeg counts time in 64 bits
        *({"start": -1}, {"start": math.nan}, {"start": math.inf}, {"stall": 0}, {"patience": -1}),
    ],
    ids=str,
)
def test_values_out_of_range_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("smooth", "smoothing")):
        Reading(**wrong)


def test_numpy_integers_are_accepted() -> None:
    with stream_of(map(frame_of, range(9)), stride=np.int64(2), max_frames=np.int64(3)) as stream:
        taken = numbers(list(stream))
    assert taken == [0, 1, 2]
    assert {type(number) for number in taken} == {int}  # so that JSON can represent them


def test_a_source_is_closed_if_its_stream_cannot_start() -> None:
    class Closed(Model):
        def describe(self) -> Any:
            raise EngineError("the engine is closed")

    source = Source(iter([frame_of(0)]))
    with pytest.raises(EngineError, match="closed"):
        stream_of(source, Closed())
    assert source.closed_by is not None
    assert_no_threads()


class Slow(Counts):
    """Lets other threads run between the reading of a count and its writing."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "failed":
            time.sleep(0.001)
        return value


def test_failures_in_two_threads_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the frames cannot be converted to the model's size, by the engine's thread, and half not to their own."""

    def pixels(self: Frame, convert: Any, *size: int) -> np.ndarray:
        if bool(size) == bool(self.pts % 2):
            raise UnreadableVideo("odd")
        return np.zeros((*(size or self.size), 3), np.uint8)

    monkeypatch.setattr(Frame, "pixels", pixels)
    monkeypatch.setattr(stream_module, "Counts", Slow)
    stream = stream_of([frame_of(n) for n in range(200)])
    assert list(stream) == []
    assert (stream.counts.decoded, stream.counts.failed, stream.counts.failure) == (200, 200, "odd")


@pytest.mark.timeout(30)
def test_idle_is_called_by_the_iterating_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LOOK_UP", 0.01)
    called: list[str] = []

    def frames() -> Iterator[Frame]:
        for number in range(2):
            seen = len(called)
            until(lambda seen=seen: len(called) >= seen + 3)  # type: ignore[misc]
            yield frame_of(number)

    def idle() -> None:
        called.append(threading.current_thread().name)

    model: Any = Model()
    assert numbers(list(Stream(frames(), model, idle=idle))) == [0, 1]
    assert set(called) == {threading.current_thread().name}


def test_notes_of_a_frame_are_in_its_result() -> None:
    hdr = frame_of(1)
    hdr.picture.color_trc = 18
    plain, noted = stream_of([frame_of(0), hdr])
    assert plain.result.notes == ()
    assert [note[:15] for note in noted.result.notes] == ["it is HDR (HLG)"]


def test_each_stream_has_its_own_smoothing() -> None:
    def frames() -> Iterator[Frame]:
        return (frame_of(100 if n % 2 else 104) for n in range(20))

    answers = [int(s.result.probability[0, 0]) for s in stream_of(frames(), smooth=0.9)]
    plain = [int(s.result.probability[0, 0]) for s in stream_of(frames())]
    assert np.ptp(answers[5:]) < np.ptp(plain)
    again = [int(s.result.probability[0, 0]) for s in stream_of(frames(), smooth=0.9)]
    assert again == answers


def test_policies_are_defined_in_one_place() -> None:
    from petseg_runtime.cli.infer import infer

    (option,) = (parameter for parameter in infer.params if parameter.name == "policy")
    assert tuple(getattr(option.type, "choices", ())) == POLICIES


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200))
def test_percentiles_match_numpys_to_two_percent(values: list[float]) -> None:
    timings = Timings()
    for value in values:
        timings.add("step", value)
    summary = timings.summary()["step"]
    assert summary["sum"] == pytest.approx(sum(values))
    for percent in (50, 95, 99):
        wanted = np.percentile(values, percent, method="inverted_cdf")
        assert summary[f"p{percent}"] == pytest.approx(wanted, rel=0.02)


def test_timings_take_bounded_memory() -> None:
    timings, values = Timings(), np.random.default_rng(0).lognormal(-5, 2, 50_000).tolist()
    tracemalloc.start()
    try:
        for value in values:
            timings.add("step", value + 1e-9)  # a distinct number, so that keeping it takes memory
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 400_000, "numbers alone would be 24 bytes each"
    assert set(timings.summary()["step"]) == {"sum", "p50", "p95", "p99"}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_no_threads() -> None:
    until(lambda: not any(thread.name.startswith("petseg") for thread in threading.enumerate()))
