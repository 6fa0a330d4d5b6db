"""A video's sound on its way through: passed on as it is, or encoded anew where the file cannot hold it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import av
import av.error

__all__ = ["Sound", "Track", "track_of", "written_to"]


@dataclass(frozen=True, eq=False)
class Track:
    """What a file must know of a sound before its first packet comes.

    Attributes:
        stream: A copy of the source's stream, which outlives the source; None: this FFmpeg cannot decode it.
        codec: FFmpeg's name.
    """

    stream: Any
    codec: str

    def fits(self, other: Track | None) -> bool:
        """Whether another track's packets may go on in the same file; a source that is connected anew may differ."""
        return other is self or (other is not None and self._kind == other._kind)

    @property
    def _kind(self) -> tuple[object, ...]:
        if self.stream is None:
            return (self.codec,)
        about = self.stream.codec_context
        return self.codec, about.sample_rate, about.layout.name, about.extradata


@dataclass(frozen=True, eq=False)
class Sound:
    """A packet of a source's sound.

    Attributes:
        packet: Encoded, with the source's own times.
        shift: Seconds to add to them.
    """

    packet: Any
    shift: Fraction

    @property
    def time(self) -> float:
        """Seconds from the first frame, before it is written."""
        pts = self.packet.dts if self.packet.pts is None else self.packet.pts
        return float(pts * self.packet.time_base + self.shift)


def track_of(stream: Any) -> Track | None:
    """A source's track; None: there is no sound in it."""
    if stream is None:
        return None
    if stream.codec_context is None:
        return Track(None, "unknown")
    return Track(_copied(stream), stream.codec_context.codec.canonical_name)


def _copied(stream: Any) -> Any:
    """A stream with all that its decoder must know: some codecs do not describe themselves in their packets.

    It belongs to a container that is never written, of FFmpeg's one format that takes every codec.
    """
    return av.open(io.BytesIO(), "w", format="null").add_stream_from_template(stream)


def written_to(file: Any, track: Track, note: Callable[[str], None], *, endless: bool) -> _Passed | _Encoded | None:
    """A track's way into a file whose header is not written yet.

    Args:
        file: An output container.
        track: Of the source.
        note: Told of what is changed or left out.
        endless: The header is written before the first packet is there, and nothing can be added to it.

    Returns:
        What takes the packets, as they are if the file can hold them, else encoded anew as the file's usual codec; None
        where they cannot be decoded either.
    """
    if track.stream is None:
        note("the sound is left out: its codec is none that this FFmpeg can decode")
        return None
    if _holds(file.format.name, track, endless):
        return _Passed(file, track)
    return _Encoded(file, track, _USUAL[file.format.name], note)


def _holds(container: str, track: Track, endless: bool) -> bool:
    """Whether a file can hold a track's packets as they are."""
    if track.codec not in _FITS[container]:
        return False
    # These describe themselves in their packets: AAC without a description of its own is that of transport streams.
    if track.codec in {"ac3", "eac3"} or (track.codec == "aac" and not track.stream.codec_context.extradata):
        return not endless
    # Of some, FFmpeg refuses to write a header: MP3 below 16 kHz in MP4, whatever is described wrongly.
    trial = av.open(io.BytesIO(), "w", format=container, options=_HEADER_FIRST[container])
    try:
        trial.add_stream_from_template(track.stream)
        trial.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    finally:
        with contextlib.suppress(av.error.FFmpegError):  # of a file without a packet
            trial.close()
    return True


#: What players take from these files. FFmpeg writes more into MP4, PCM among it, which few of them play.
_FITS: Final = {"mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}, "webm": {"opus", "vorbis"}}

#: What has the whole description of the sound written at once.
_HEADER_FIRST: Final[dict[str, dict[str, str]]] = {"mp4": {"movflags": "empty_moov"}, "webm": {}}

#: The codec of what does not fit, and its rates in Hz, the usual one first.
_USUAL: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "mp4": ("aac", (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)),
    "webm": ("libopus", (48000, 24000, 16000, 12000, 8000)),
}


#: Seconds: what is shorter is no gap in the sound, but a rounded time.
_GAP: Final = 0.03


class _Passed:
    """Packets as they are."""

    def __init__(self, file: Any, track: Track) -> None:
        self._file, self._stream = file, file.add_stream_from_template(track.stream)
        self._last: Fraction | None = None  # the decoding time of the last packet

    def write(self, sound: Sound, start: Fraction) -> None:
        """Write a packet; what lies before ``start``, in seconds, is left out."""
        packet = sound.packet
        # A packet is never passed twice, so its times may be changed in place.
        moved = round((sound.shift - start) / packet.time_base)
        packet.dts = packet.dts + moved
        packet.pts = packet.dts if packet.pts is None else packet.pts + moved
        time = packet.dts * packet.time_base
        # The packet before the first one that is heard goes along: decoders need it to begin with. What a source that
        # was connected anew sends once more is left out.
        if packet.pts + (packet.duration or 0) >= 0 and (self._last is None or time > self._last):
            packet.stream, self._last = self._stream, time
            self._file.mux(packet)

    def close(self) -> None:
        """Nothing is left to write."""


class _Encoded:
    """Packets decoded, and encoded as something that the file can hold."""

    def __init__(
        self, file: Any, track: Track, usual: tuple[str, tuple[int, ...]], note: Callable[[str], None]
    ) -> None:
        codec, rates = usual
        self._file, self._codec, self._note = file, track.codec, note
        self._decoder = source = _copied(track.stream).codec_context
        rate = source.sample_rate if source.sample_rate in rates else rates[0]
        layout = "mono" if source.layout.nb_channels == 1 else "stereo"
        self._stream = file.add_stream(codec, rate=rate, layout=layout)
        encoder = self._stream.codec_context
        encoder.open()
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None  # of the frames that it takes
        self._next: Fraction | None = None  # where the next frame should begin, in seconds
        note(f"the sound ({track.codec}) is encoded anew as {encoder.codec.canonical_name}")

    def write(self, sound: Sound, start: Fraction) -> None:
        """Write a packet; what lies before ``start``, in seconds, is left out."""
        for frame in self._tried(self._decoder.decode, sound.packet):
            if frame.pts is not None and self._place(frame, sound.shift - start):
                self._fit(frame)
                self._encode(self._tried(self._resampler.resample, frame))

    def _fit(self, frame: Any) -> None:
        """Have a resampler for frames of this kind: in one broadcast mono, stereo and 5.1 may follow each other."""
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if self._resampler is None or kind != self._kind:
            self._encode(self._tried(self._rest))
            encoder, self._kind = self._stream.codec_context, kind
            self._resampler = av.AudioResampler(encoder.format, encoder.layout, encoder.sample_rate)

    def _rest(self) -> list[Any]:
        """What the resampler still holds; one that changes nothing returns what it is given, here None."""
        return [frame for frame in self._resampler.resample(None) if frame] if self._resampler else []

    def _tried(self, step: Callable[..., list[Any]], *given: Any) -> list[Any]:
        """What a step makes; where it fails, nothing and a note: sound may be damaged, and the picture goes on."""
        try:
            return step(*given)
        except (av.error.FFmpegError, ValueError):
            self._note(f"a part of the sound ({self._codec}) cannot be converted and is left out")
            self._resampler = None  # one that has failed may be half made
            return []

    def _place(self, frame: Any, shift: Fraction) -> bool:
        """Say where a frame lies, in samples; False: before the start, or on what is there already."""
        base = Fraction(1, frame.sample_rate)
        begins = round((frame.pts * frame.time_base + shift) / base) * base
        # Containers round times, some to milliseconds; frames follow each other without a gap all the same.
        if self._next is not None and abs(begins - self._next) < _GAP:
            begins = self._next
        if begins < (self._next or 0):
            return False
        frame.pts, frame.time_base = round(begins / base), base
        self._next = (frame.pts + frame.samples) * base
        return True

    def _encode(self, frames: Iterable[Any]) -> None:
        for frame in frames:
            self._file.mux(self._tried(self._stream.encode, frame))  # which refuses what is no number

    def close(self) -> None:
        """Write what the encoder still holds."""
        self._encode(self._tried(self._rest))
        self._file.mux(self._tried(self._stream.encode, None))
