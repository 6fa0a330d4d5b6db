"""The Python API: a :class:`Segmenter` loads a model and segments photos, videos and live streams."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeAlias, overload
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from PIL import Image

from petseg_runtime import host, images, pipeline
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import InputError, ModelError, UsageError
from petseg_runtime.regions import without_doubtful
from petseg_runtime.result import Segmentation
from petseg_runtime.sources import Origin, stream_origin

if TYPE_CHECKING:
    from petseg_runtime.verify import Verification
    from petseg_runtime.video.live import StateChange
    from petseg_runtime.video.stream import Stream

__all__ = ["Prepared", "Segmenter", "finish", "prepare_opened"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: With the engine on a GPU, at most this many threads read photos, and as many write results; disks and memory gain
#: nothing from more.
MAX_WORKERS: Final = 16


@dataclass(frozen=True, eq=False)
class Prepared:
    """A decoded photo and the model input made from it.

    Attributes:
        image: uint8 [H, W, 3] RGB, at the model's size.
        pixels: uint8 [height, width, 3] RGB, the photo; None if only the mask is wanted.
        height: Height of the upright photo.
        width: Width of the upright photo.
        notes: Decisions made while decoding it; see :class:`petseg_runtime.Photo`.
        icc_profile: The ICC profile of ``pixels``; None: sRGB.
    """

    image: U8
    pixels: U8 | None
    height: int
    width: int
    notes: tuple[str, ...]
    icc_profile: bytes | None = None


@dataclass(frozen=True, eq=False)
class _Pending:
    """A photo of :meth:`Segmenter.map` that waits for a reader thread.

    Attributes:
        source: The photo, which the caller does not change meanwhile.
        name: Its name in error messages; None: as its source.
        lock: Held while it is decoded: threads that read the same PIL image share the position in its file.
    """

    source: images.ImageSource
    name: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


def prepare_opened(photo: images.OpenPhoto, size: tuple[int, int], *, mask_only: bool = False) -> Prepared:
    """Decode a photo and resize it to a model's height and width; see :meth:`Segmenter.prepare_opened`."""
    read = photo.decode(size, mask_only=mask_only)
    image = images.to_model(read.pixels, *size) if read.model_input is None else read.model_input
    full_size = read.pixels.shape[:2] == (read.height, read.width)
    pixels = read.pixels if full_size and not mask_only else None
    return Prepared(image, pixels, read.height, read.width, read.notes, read.icc_profile)


def finish(
    prepared: Prepared, probability: U8, threshold: float, cutout_threshold: float, certain_share: float | None = None
) -> Segmentation:
    """Resize a model's output, uint8 [H, W], to the photo's size; see :meth:`Segmenter.finish`."""
    return Segmentation(
        prepared.pixels,
        images.from_model(probability, prepared.height, prepared.width),
        threshold,
        cutout_threshold,
        prepared.notes,
        prepared.icc_profile,
        certain_share,
    )


class Segmenter:
    """A loaded model that segments photos, videos and live streams. Safe to share between threads.

    >>> Segmenter()("cat.jpg").cutout().save("cutout.png")  # doctest: +SKIP

    Attributes:
        artifact: The model file: its specification, provenance and parity receipt.
        size: Height and width that photos are resized to.
        threshold: Probability from which a pixel is in the mask, in (0, 1).
        cutout_threshold: Probability at which a cutout is half transparent, in (0, 1).
        certain_share: The model's rule for whether a photo shows a pet, in (0, 1]; None: it has none. See
            :attr:`petseg_runtime.Segmentation.found`.
        min_area: As passed to the constructor; likewise ``keep_doubtful`` and ``threads``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        streams: int = 1,
        size: tuple[int, int] | None = None,
        threshold: float | None = None,
        cutout_threshold: float | None = None,
        min_area: float = 0.0,
        keep_doubtful: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: A file made by ``petseg export``; None: the built-in model.
            backend: The engine, or ``auto``: the fastest that works on this machine (``petseg doctor`` prints the
                rule).
            device: ``cpu``, ``cuda[:N]``, ``intel-gpu[:N]`` or ``auto``. Naming a device that is not available is an
                error.
            threads: CPU threads, 1 or more; None: as many as this process may use.
            streams: How many photos are inferred at a time, sharing the threads: 1 gives the lowest latency, the number
                of threads the highest throughput (with :meth:`map`, or several threads of your own).
            size: Height and width that photos are resized to, for a model that accepts any; None: the model's default.
            threshold: Probability from which a pixel is in the mask, in (0, 1); None: the model's default, chosen on
                validation photos.
            cutout_threshold: Probability at which a cutout is half transparent, in (0, 1); None: the model's default.
            min_area: Regions smaller than this share of the photo are removed from results; in [0, 1).
            keep_doubtful: Keep everything the model outputs, not only regions with near-certain pixels; see
                :func:`petseg_runtime.regions.without_doubtful`.
            tell: Called with a short text before a slow step (compiling the model for this GPU), and for each engine
                that ``auto`` skips because it does not work; None: a skipped engine is a ``RuntimeWarning``.

        Raises:
            UsageError: A number is out of range, or the model does not accept that size.
            ModelError: The file is missing, damaged or not a petseg model.
            EngineError: The engine or device is not available, or cannot load the model.
        """
        for name, value in (("threshold", threshold), ("cutout_threshold", cutout_threshold)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{name} is {value}; it must be between 0 and 1, exclusive")
        if not 0 <= min_area < 1:
            raise UsageError(f"min_area is {min_area}; it must be a share of the photo, at least 0 and below 1")
        self.artifact = open_artifact(Path(model) if model is not None else default_model())
        spec = self.artifact.spec
        try:
            height, width = (spec.height, spec.width) if size is None else size
            spec.sized(height, width)
        except (TypeError, ValueError) as error:
            raise UsageError(f"size is {size!r}; it must be (height, width)") from error
        except ModelError as error:  # the size is wrong, not the model
            raise UsageError(str(error)) from error
        self.size = (height, width)
        self.threshold = threshold if threshold is not None else spec.threshold
        self.cutout_threshold = cutout_threshold if cutout_threshold is not None else spec.cutout_threshold
        self.certain_share = spec.certain_share
        self.min_area, self.keep_doubtful = min_area, keep_doubtful
        self.threads = threads
        self._engine = load_engine(
            self.artifact,
            backend,
            threads,
            device=device,
            streams=streams,
            size=self.size,
            tell=tell,
            warn=tell or (lambda why: warnings.warn(f"skipped: {why}", RuntimeWarning, stacklevel=4)),
        )

    @overload
    def __call__(self, source: images.ImageSource) -> Segmentation: ...  # type: ignore[overload-overlap] # str, bytes

    @overload
    def __call__(self, source: Sequence[images.ImageSource]) -> list[Segmentation]: ...

    def __call__(self, source: images.ImageSource | Sequence[images.ImageSource]) -> Segmentation | list[Segmentation]:
        """Segment one photo, or a list of them.

        Args:
            source: A path, an encoded image as bytes, an open binary file, a uint8 array ([H, W, 3] RGB, [H, W] grey or
                [H, W, 4] RGBA), or a PIL image; or a list or tuple of these.

        Returns:
            The photo's result; for a list or tuple, a list of results in the same order.

        Raises:
            InputError: A photo cannot be used. In a list, the first such photo ends the call before the photos after it
                are done; :meth:`map` continues with the next photo instead.
            EngineError: The engine failed.
        """
        if isinstance(source, (list, tuple)):
            return self._all(source)
        prepared = self.prepare(source)  # type: ignore[arg-type]
        return self.finish(prepared, self.infer(prepared.image[None])[0])

    def _all(self, sources: Iterable[images.ImageSource]) -> list[Segmentation]:
        """Returns the results of all photos, or raises the first :class:`InputError` as soon as its turn comes."""
        results = []
        with contextlib.closing(self._map(sources)) as running:
            for result in running:
                if isinstance(result, InputError):
                    raise result
                results.append(result)
        return results

    def map(self, sources: Iterable[images.ImageSource]) -> Iterator[Segmentation | InputError]:
        """Segment many photos, reading the next ones meanwhile. Yields results lazily, in the order of the photos.

        Args:
            sources: Photos, each as for a call. Iterated over lazily, a bounded number of photos ahead of the results.
                Arrays, byte buffers and open files are copied, so you may refill or close them before the next photo;
                you may likewise draw on a PIL image again, or seek it to its next frame. But an image of
                ``PIL.Image.open`` that is not decoded yet must stay open and unchanged until its result is there.

        Returns:
            An iterator over each photo's result, or the :class:`InputError` that explains why there is none.

        Raises:
            UsageError: ``sources`` is a single photo.
            EngineError: The engine failed.
        """
        if images.is_photo(sources):  # iterating would yield a path's letters, a file's lines, an array's rows
            kind = type(sources).__name__
            raise UsageError(
                f"map expects an iterable of photos, not a single one ({kind}); call the segmenter with it or map([it])"
            )
        return self._map(sources)

    def _map(self, sources: Iterable[images.ImageSource]) -> Generator[Segmentation | InputError]:
        def read(source: _Pending | Prepared | InputError, reserve: Callable[[int], None]) -> Prepared:
            if isinstance(source, Prepared):
                return source
            if isinstance(source, InputError):
                raise source
            with images.open_photo(source.source, name=source.name) as photo:
                reserve(photo.memory)
                with source.lock:
                    return self.prepare_opened(photo)

        info = self.describe()
        steps: pipeline.Steps[_Pending | Prepared | InputError, Segmentation] = pipeline.Steps(
            read, self.infer, lambda _, prepared, output: self.finish(prepared, output)
        )
        lazy: WeakValueDictionary[int, _Pending] = WeakValueDictionary()  # PIL images in the pipeline by their id()
        with pipeline.Pipeline(steps, info.streams, info.batch, workers=self.workers) as running:
            for outcome in running.run(self._kept(source, lazy) for source in sources):
                result = outcome.error or outcome.value
                assert result is not None
                yield result

    def _kept(
        self, source: images.ImageSource, lazy: WeakValueDictionary[int, _Pending]
    ) -> _Pending | Prepared | InputError:
        """Returns a source that is safe to read later, whatever the caller does with the original meanwhile.

        Arrays and buffers are copied, since camera loops refill the same one. An open file is read into memory, since a
        generator may close it when the next photo is requested. A PIL image that may change is decoded now.

        Args:
            source: As the caller has given it.
            lazy: The PIL images that reader threads may be reading; this one is added if it is read later.
        """
        if isinstance(source, np.ndarray):
            return _Pending(source.copy())
        if isinstance(source, (bytearray, memoryview)):
            return _Pending(bytes(source))
        if isinstance(source, io.BytesIO) and not source.closed:
            return _Pending(source.getvalue())
        # An object of another type is rejected when it is read.
        if isinstance(source, (str, os.PathLike, bytes)) or not images.is_photo(source):
            return _Pending(source)
        try:
            if not isinstance(source, Image.Image):
                return _Pending(*images.contents(source))
            if pending := lazy.get(id(source)):
                return pending
            if images.may_change(source):
                return self.prepare(source)
        except InputError as error:
            return error
        lazy[id(source)] = pending = _Pending(source)
        return pending

    def stream(
        self,
        source: str | int | os.PathLike[str] | Origin,
        *,
        policy: str | None = None,
        start: float = 0.0,
        stride: int = 1,
        max_frames: int | None = None,
        mask_only: bool = False,
        smooth: float = 0.0,
        stall: float = 10.0,
        patience: float | None = None,
        tell: Callable[[StateChange], None] = lambda change: None,
    ) -> Stream:
        """Segment a video or a live stream frame by frame, decoding the next frames meanwhile.

        >>> with Segmenter().stream("clip.mp4") as stream:  # doctest: +SKIP
        ...     for segmented in stream:
        ...         print(segmented.frame.time, segmented.result.coverage)

        Args:
            source: A video file, a camera (``0``, ``"0"``, ``/dev/video0``), a URL (RTSP, RTMP, HTTP, UDP, ...), or
                an :class:`~petseg_runtime.sources.Origin` for more (options for FFmpeg).
            policy: What happens to frames that arrive faster than they are processed: ``block``, ``drop-oldest`` or
                ``latest``; None: ``block`` for a source that ends, ``drop-oldest`` for a live one. See
                :class:`~petseg_runtime.video.stream.Stream`.
            start: Seconds to skip at the beginning of a source that ends; 0 or more.
            stride: Segment every ``stride``-th frame; 1 or more.
            max_frames: Stop after this many frames, 1 or more; None: at the end of the source.
            mask_only: Don't keep the frames' pixels; cutouts and overlays cannot be made from the results.
            smooth: Strength of the smoothing against flicker, in [0, 1); see
                :class:`~petseg_runtime.video.smoothing.Smoother`.
            stall: Reconnect to a live source after this many seconds without a frame; above 0.
            patience: Give up on a live source after this many seconds without a frame, 0 or more; None: after half a
                minute until its first frame, never after that.
            tell: Called with each change of a live source's state.

        Returns:
            An iterator over :class:`~petseg_runtime.video.stream.Segmented`, also a context manager; its ``counts``
            attribute accounts for every frame. Iterating may raise the errors of the source and of the engine.

        Raises:
            UsageError: The policy is unknown, a value is out of range, or the URL is that of a photo (for a camera
                whose URL looks like one, pass an :class:`~petseg_runtime.sources.Origin` with options for FFmpeg).
            InputError: A source that ends cannot be opened.
        """
        from petseg_runtime.video.live import open_frames  # loads FFmpeg, which photos do not need
        from petseg_runtime.video.stream import Reading, Stream

        if isinstance(source, Origin):
            origin = source
        else:
            # An int is a camera, even if a file has that name.
            text = f"/dev/video{source}" if isinstance(source, int) else os.fspath(source)
            origin = stream_origin(text) or Origin(text, text, PurePath(Path(text).stem))
        reading = Reading(
            start=start,
            stride=stride,
            max_frames=max_frames,
            policy=policy,
            stall=stall,
            patience=patience,
            smooth=smooth,
        ).of(endless=origin.endless)
        frames = open_frames(origin, reading, threads=self.threads, tell=tell)
        return Stream(frames, self, reading, mask_only=mask_only)

    def prepare(self, source: images.ImageSource, *, mask_only: bool = False) -> Prepared:
        """Read a photo and resize it to the model's size: the first step of a call.

        Args:
            source: As for a call.
            mask_only: Don't keep the photo's pixels; cutouts and overlays cannot be made from the result.

        Raises:
            InputError: The photo cannot be used.
        """
        with images.open_photo(source) as photo:
            return self.prepare_opened(photo, mask_only=mask_only)

    def prepare_opened(self, photo: images.OpenPhoto, *, mask_only: bool = False) -> Prepared:
        """As :meth:`prepare`, for a photo that is open; keeps no pixels if it is decoded at a reduced size."""
        return prepare_opened(photo, self.size, mask_only=mask_only)

    def infer(self, batch: U8) -> U8:
        """Run the network on a batch: the second step of a call.

        Args:
            batch: uint8 [N, H, W, 3] RGB, at the model's size.

        Returns:
            uint8 [N, H, W], ``round(255 * p(pet))``.

        Raises:
            UsageError: The batch has another shape or dtype.
            EngineError: The engine failed.
        """
        return self._engine.run(batch)

    def finish(self, prepared: Prepared, probability: U8) -> Segmentation:
        """Postprocess the network's output and resize it to the photo's size: the last step of a call.

        Low-confidence regions are removed, unless ``keep_doubtful``, and so are those smaller than ``min_area``.

        Args:
            prepared: The photo, from :meth:`prepare`.
            probability: uint8 [H, W], ``round(255 * p(pet))``: the photo's output from :meth:`infer`.

        Raises:
            UsageError: ``probability`` has another shape or dtype.
        """
        expected = prepared.image.shape[:2]
        if probability.dtype != np.uint8 or probability.shape != expected:
            raise UsageError(
                f"probability is {probability.dtype} {list(probability.shape)}; it must be uint8 {list(expected)}, "
                "one photo's output of infer()"
            )
        if not self.keep_doubtful:
            probability = without_doubtful(probability)
        result = finish(prepared, probability, self.threshold, self.cutout_threshold, self.certain_share)
        return result.without_small(self.min_area) if self.min_area else result

    def verify(self, proof: str | os.PathLike[str] | None = None) -> Verification:
        """Check, in a few seconds, that this engine on this machine computes what the model's checkpoint does.

        Repeats the parity test: the engine's outputs on the photos of the parity record must match the checkpoint's
        outputs stored in it, within the tolerances. Also checks that the sample photos are decoded, resized and given
        masks of their size as on the machine where petseg was built.

        >>> Segmenter().verify().passed  # doctest: +SKIP

        Args:
            proof: The parity record: photos and the checkpoint's outputs; None: ``FILE.parity.npz`` beside the model.

        Raises:
            UsageError: This segmenter's ``size`` differs from that of the parity record.
            ModelError: The parity record is missing, damaged or of another model.
            ParityShapes: The outputs' shapes or dtypes violate the model's contract.
        """
        spec = self.artifact.spec
        if self.size != (spec.height, spec.width):
            raise UsageError(
                f"this Segmenter resizes photos to {self.size[0]} x {self.size[1]}, but the parity record is for "
                f"{spec.height} x {spec.width}; verify with a Segmenter without a size"
            )
        from petseg_runtime.verify import verify_engine  # few programs need it

        return verify_engine(self.artifact, self._engine, Path(proof) if proof is not None else None)

    def describe(self) -> EngineInfo:
        """Describe what is running: the engine, its device, precision, threads and batch size."""
        return self._engine.describe()

    @property
    def workers(self) -> int:
        """How many threads read photos, and how many write results, when there are many photos.

        With the engine on the CPU, which shares its threads with them: as many as the engine has streams. With the
        engine on a GPU, which needs several threads to keep it busy: as many as there are CPU threads, up to
        :data:`MAX_WORKERS`.
        """
        info = self.describe()
        if info.device == "cpu":
            return info.streams
        return min(self.threads or host.usable_cpus(), MAX_WORKERS)

    def close(self) -> None:
        """Free the model. Using the segmenter after that raises ``EngineError``."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, trace)
