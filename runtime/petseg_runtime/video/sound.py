"""A video's audio on its way to the result: passed through, or re-encoded where the file cannot hold it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import av
import av.error

__all__ = ["Sound", "Track", "audio_writer", "track_of"]


@dataclass(frozen=True, eq=False)
class Track:
    """What a file must know about an audio stream before its first packet.

    Attributes:
        stream: A copy of the source's stream, which outlives the source; None: this FFmpeg cannot decode it.
        codec: FFmpeg's name.
    """

    stream: Any
    codec: str

    def fits(self, other: Track | None) -> bool:
        """Whether another track's packets may continue in the same file; after a reconnect they may be different."""
        return other is self or (other is not None and self._kind == other._kind)

    @property
    def _kind(self) -> tuple[object, ...]:
        if self.stream is None:
            return (self.codec,)
        about = self.stream.codec_context
        return self.codec, about.sample_rate, about.layout.name, about.extradata


@dataclass(frozen=True, eq=False)
class Sound:
    """An audio packet of a source.

    Attributes:
        packet: Encoded, with the source's timestamps.
        shift: Seconds to add to them.
    """

    packet: Any
    shift: Fraction

    @property
    def time(self) -> float:
        """Seconds from the first frame; valid until the packet is written."""
        pts = self.packet.dts if self.packet.pts is None else self.packet.pts
        return float(pts * self.packet.time_base + self.shift)


def track_of(stream: Any) -> Track | None:
    """The track of a source's audio stream; None: the source has none."""
    if stream is None:
        return None
    if stream.codec_context is None:
        return Track(None, "unknown")
    return Track(_copy_of(stream), stream.codec_context.codec.canonical_name)


def _copy_of(stream: Any) -> Any:
    """A copy of a stream, with everything its decoder must know: some codecs do not describe themselves in packets.

    It belongs to a container that is never written, of the one FFmpeg format that accepts every codec.
    """
    return av.open(io.BytesIO(), "w", format="null").add_stream_from_template(stream)


def audio_writer(
    file: Any, track: Track, note: Callable[[str], None], *, endless: bool
) -> _PassThrough | _Transcoder | None:
    """Add a track to a file whose header is not written yet.

    Args:
        file: An output container.
        track: Of the source.
        note: Called with what is changed or left out.
        endless: The header is written before the first packet, and cannot be completed later.

    Returns:
        A writer of packets, which passes them through if the file can hold them, else re-encodes them with the default
        codec of the file; None if they cannot be decoded either.
    """
    if track.stream is None:
        note("the audio is left out: this FFmpeg cannot decode its codec")
        return None
    if _can_hold(file.format.name, track, endless):
        return _PassThrough(file, track)
    return _Transcoder(file, track, _FALLBACK[file.format.name], note)


def _can_hold(container: str, track: Track, endless: bool) -> bool:
    """Whether a file can hold a track's packets unchanged."""
    if track.codec not in _PLAYABLE[container]:
        return False
    # These are described by their packets only: AAC without extradata is that of transport streams.
    if track.codec in {"ac3", "eac3"} or (track.codec == "aac" and not track.stream.codec_context.extradata):
        return not endless
    # For some, FFmpeg refuses to write a header: MP3 below 16 kHz in MP4, or anything with a wrong description.
    trial = av.open(io.BytesIO(), "w", format=container, options=_HEADER_FIRST[container])
    try:
        trial.add_stream_from_template(track.stream)
        trial.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    finally:
        with contextlib.suppress(av.error.FFmpegError):  # the file has no packets
            trial.close()
    return True


#: What players accept in these files. FFmpeg also writes PCM and others into MP4, which few players accept.
_PLAYABLE: Final = {"mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}, "webm": {"opus", "vorbis"}}

#: Options that make FFmpeg write the complete description of the audio with the header.
_HEADER_FIRST: Final[dict[str, dict[str, str]]] = {"mp4": {"movflags": "empty_moov"}, "webm": {}}

#: The codec for what does not fit, and its sample rates in Hz, the default first.
_FALLBACK: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "mp4": ("aac", (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)),
    "webm": ("libopus", (48000, 24000, 16000, 12000, 8000)),
}


#: Seconds: a shorter gap in the audio is a rounded timestamp.
_GAP: Final = 0.03


class _PassThrough:
    """Passes packets through."""

    def __init__(self, file: Any, track: Track) -> None:
        self._file, self._stream = file, file.add_stream_from_template(track.stream)
        self._last: Fraction | None = None  # the last packet's DTS, in seconds

    def write(self, sound: Sound, start: Fraction) -> None:
        """Write a packet; leave out what lies before ``start``, in seconds."""
        packet = sound.packet
        # A packet is written only once, so its timestamps may be changed in place.
        moved = round((sound.shift - start) / packet.time_base)
        packet.dts = packet.dts + moved
        packet.pts = packet.dts if packet.pts is None else packet.pts + moved
        time = packet.dts * packet.time_base
        # The packet before the first audible one is kept, because decoders need it to start. What a source sends again
        # after a reconnect is left out.
        if packet.pts + (packet.duration or 0) >= 0 and (self._last is None or time > self._last):
            packet.stream, self._last = self._stream, time
            self._file.mux(packet)

    def close(self) -> None:
        """Do nothing: no packet is held back."""


class _Transcoder:
    """Decodes packets and re-encodes them in a codec that the file can hold."""

    def __init__(
        self, file: Any, track: Track, fallback: tuple[str, tuple[int, ...]], note: Callable[[str], None]
    ) -> None:
        codec, rates = fallback
        self._file, self._codec, self._note = file, track.codec, note
        self._decoder = source = _copy_of(track.stream).codec_context
        rate = source.sample_rate if source.sample_rate in rates else rates[0]
        layout = "mono" if source.layout.nb_channels == 1 else "stereo"
        self._stream = file.add_stream(codec, rate=rate, layout=layout)
        encoder = self._stream.codec_context
        encoder.open()
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None  # of the frames that the resampler accepts
        self._next: Fraction | None = None  # where the next frame is due, in seconds
        note(f"the audio ({track.codec}) is re-encoded as {encoder.codec.canonical_name}")

    def write(self, sound: Sound, start: Fraction) -> None:
        """Write a packet; leave out what lies before ``start``, in seconds."""
        for frame in self._try(self._decoder.decode, sound.packet):
            if frame.pts is not None and self._set_time(frame, sound.shift - start):
                self._update_resampler(frame)
                self._encode(self._try(self._resampler.resample, frame))

    def _update_resampler(self, frame: Any) -> None:
        """Get a resampler for a frame: within one broadcast, mono, stereo and 5.1 may follow each other."""
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if self._resampler is None or kind != self._kind:
            self._encode(self._try(self._drain_resampler))
            encoder, self._kind = self._stream.codec_context, kind
            self._resampler = av.AudioResampler(encoder.format, encoder.layout, encoder.sample_rate)

    def _drain_resampler(self) -> list[Any]:
        """What the resampler still holds; one that changes nothing returns its input, here None."""
        return [frame for frame in self._resampler.resample(None) if frame] if self._resampler else []

    def _try(self, step: Callable[..., list[Any]], *given: Any) -> list[Any]:
        """Run a step; if it fails, note it and return nothing: damaged audio must not end the video."""
        try:
            return step(*given)
        except (av.error.FFmpegError, ValueError):
            self._note(f"part of the audio ({self._codec}) cannot be converted and is left out")
            self._resampler = None  # after a failure, it may be half initialized
            return []

    def _set_time(self, frame: Any, shift: Fraction) -> bool:
        """Set a frame's time, in samples; False: it lies before the start, or overlaps the frame before."""
        base = Fraction(1, frame.sample_rate)
        begins = round((frame.pts * frame.time_base + shift) / base) * base
        # Containers round timestamps, some to milliseconds; the frames are contiguous all the same.
        if self._next is not None and abs(begins - self._next) < _GAP:
            begins = self._next
        if begins < (self._next or 0):
            return False
        frame.pts, frame.time_base = round(begins / base), base
        self._next = (frame.pts + frame.samples) * base
        return True

    def _encode(self, frames: Iterable[Any]) -> None:
        for frame in frames:
            self._file.mux(self._try(self._stream.encode, frame))  # which rejects NaN

    def close(self) -> None:
        """Write what the encoder still holds."""
        self._encode(self._try(self._drain_resampler))
        self._file.mux(self._try(self._stream.encode, None))
