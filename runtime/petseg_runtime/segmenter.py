"""The Python API: ``Segmenter()("cat.jpg").mask``."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeAlias, overload

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

#: Threads that read photos beside a GPU, at most, and as many that write; disks and the memory gain nothing from more.
MAX_WORKERS: Final = 16


@dataclass(frozen=True, eq=False)
class Prepared:
    """A photo that has been read.

    Attributes:
        image: uint8 [H, W, 3] RGB, at the model's size.
        pixels: uint8 [height, width, 3] RGB, the photo; None where only the mask is wanted.
        height: Of the photo, upright.
        width: Of the photo, upright.
        notes: What had to be decided while reading it.
        icc_profile: Of the photo's colours; None: none.
    """

    image: U8
    pixels: U8 | None
    height: int
    width: int
    notes: tuple[str, ...]
    icc_profile: bytes | None = None


def prepare_opened(photo: images.OpenPhoto, size: tuple[int, int], *, mask_only: bool = False) -> Prepared:
    """Decode a photo, and bring it to a model's height and width; see :meth:`Segmenter.prepare_opened`."""
    read = photo.decode()
    image = images.to_model(read.pixels, *size)
    whole = read.pixels.shape[:2] == (read.height, read.width)
    pixels = read.pixels if whole and not mask_only else None
    return Prepared(image, pixels, read.height, read.width, read.notes, read.icc_profile)


def finish(
    prepared: Prepared, probability: U8, threshold: float, cutout_threshold: float, certain_share: float | None = None
) -> Segmentation:
    """Bring a model's answer, uint8 [H, W], to the photo's size; see :meth:`Segmenter.finish`."""
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
    """A loaded model that segments photos. Safe to share between threads.

    >>> Segmenter()("cat.jpg").cutout().save("cutout.png")  # doctest: +SKIP

    Attributes:
        artifact: The model file: its specification, provenance and receipt.
        size: Height and width that photos are brought to.
        threshold: Where results' masks are cut, in (0, 1).
        cutout_threshold: Where their cutouts are half transparent, in (0, 1).
        certain_share: The model's rule of whether there is a pet, in (0, 1]; None: it has none.
        min_area: As given; likewise ``keep_doubtful`` and ``threads``.
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
            model: A file that ``petseg export`` made; None: the one that ships with petseg.
            backend: The engine, or ``auto``: the fastest that works here (``petseg doctor`` prints the rule).
            device: ``cpu``, ``cuda[:N]``, ``intel-gpu[:N]`` or ``auto``. What is asked for and is not there is an
                error.
            threads: CPU threads, 1 or more; None: as many as this process may use.
            streams: How many photos share the threads at a time: 1 for the shortest wait for one photo, the number of
                threads for the most photos a second (:meth:`map`, or several threads of your own).
            size: Height and width that photos are brought to, for a model that takes any; None: the model's own.
            threshold: In (0, 1); None: the model's own, chosen on validation photos.
            cutout_threshold: In (0, 1); None: the model's own.
            min_area: Regions smaller than this share of the photo are dropped; in [0, 1).
            keep_doubtful: Results show all that the model says, not only the regions that it is all but certain of; see
                :func:`petseg_runtime.regions.without_doubtful`.
            tell: Told, in a few words, before something that takes long (a compilation for this GPU), and of an engine
                that ``auto`` passes over because it does not work; None: of the latter, a ``RuntimeWarning`` tells.

        Raises:
            UsageError: A number is out of range, or the model does not take that size.
            ModelError: The file is missing, damaged or not petseg's.
            EngineError: The engine or the device cannot be had, or cannot load the model.
        """
        for name, value in (("threshold", threshold), ("cutout_threshold", cutout_threshold)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
        if not 0 <= min_area < 1:
            raise UsageError(f"min_area is {min_area}; it is a share of the photo, from 0 to below 1")
        self.artifact = open_artifact(Path(model) if model is not None else default_model())
        spec = self.artifact.spec
        try:
            height, width = (spec.height, spec.width) if size is None else size
            spec.sized(height, width)
        except (TypeError, ValueError) as error:
            raise UsageError(f"size is {size!r}; (height, width) is expected") from error
        except ModelError as error:  # the model is well; it is the size that is not
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
            warn=tell or (lambda why: warnings.warn(f"passed over: {why}", RuntimeWarning, stacklevel=4)),
        )

    @overload
    def __call__(self, source: images.ImageSource) -> Segmentation: ...  # type: ignore[overload-overlap] # str, bytes

    @overload
    def __call__(self, source: Sequence[images.ImageSource]) -> list[Segmentation]: ...

    def __call__(self, source: images.ImageSource | Sequence[images.ImageSource]) -> Segmentation | list[Segmentation]:
        """Segment one photo, or a list of them.

        Args:
            source: A path, encoded bytes, an open binary file, a uint8 array ([H, W, 3] RGB, [H, W] grey or [H, W, 4]
                RGBA), or a PIL image; or a list or tuple of these.

        Returns:
            The photo's result; of a list or tuple a list of them, in order.

        Raises:
            InputError: A photo cannot be used: the first one of them, before those behind it are done. (:meth:`map`
                goes on without it.)
            EngineError: The engine failed.
        """
        if isinstance(source, (list, tuple)):
            return self._all(source)
        prepared = self.prepare(source)  # type: ignore[arg-type]
        return self.finish(prepared, self.infer(prepared.image[None])[0])

    def _all(self, sources: Iterable[images.ImageSource]) -> list[Segmentation]:
        """The results of many photos, or the first error, as soon as it is known."""
        results = []
        with contextlib.closing(self._map(sources)) as running:
            for result in running:
                if isinstance(result, InputError):
                    raise result
                results.append(result)
        return results

    def map(self, sources: Iterable[images.ImageSource]) -> Iterator[Segmentation | InputError]:
        """Segment many photos, while others are being read: results come in order, and lazily.

        Args:
            sources: Photos, as for a call; a generator is taken from as results are, some photos ahead of them. An
                array (a buffer of bytes, a BytesIO) is copied, so that it may be filled with the next photo; so may a
                PIL image, or be turned to its next frame.

        Returns:
            For each photo its result, or the :class:`InputError` that says why there is none.

        Raises:
            UsageError: It is one photo.
            EngineError: The engine failed.
        """
        if images.is_photo(sources):  # a path's letters, a file's lines and an array's rows are no photos
            kind = type(sources).__name__
            raise UsageError(
                f"map takes many photos, and was given one ({kind}): call the segmenter with it, or map([it])"
            )
        return self._map(sources)

    def _map(self, sources: Iterable[images.ImageSource]) -> Generator[Segmentation | InputError]:
        def read(source: images.ImageSource | Prepared | InputError, reserve: Callable[[int], None]) -> Prepared:
            if isinstance(source, Prepared):
                return source
            if isinstance(source, InputError):
                raise source
            with images.open_photo(source) as photo:
                reserve(photo.memory)
                return self.prepare_opened(photo)

        info = self.describe()
        steps: pipeline.Steps[images.ImageSource | Prepared | InputError, Segmentation] = pipeline.Steps(
            read, self.infer, lambda _, prepared, answer: self.finish(prepared, answer)
        )
        with pipeline.Pipeline(steps, info.streams, info.batch, workers=self.workers) as running:
            for outcome in running.run(map(self._kept, sources)):
                result = outcome.error or outcome.value
                assert result is not None
                yield result

    def _kept(self, source: images.ImageSource) -> images.ImageSource | Prepared | InputError:
        """A source that can be read later: arrays and buffers are copied, since camera loops fill the same one again.

        A PIL image that may not be the same later is read now.
        """
        if isinstance(source, np.ndarray):
            return source.copy()
        if isinstance(source, (bytearray, memoryview)):
            return bytes(source)
        if isinstance(source, io.BytesIO) and not source.closed:
            return source.getvalue()
        try:
            return self.prepare(source) if isinstance(source, Image.Image) and images.may_change(source) else source
        except InputError as error:
            return error

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
        """Segment a video or a live stream, frame by frame, while the next ones are being decoded.

        >>> with Segmenter().stream("clip.mp4") as stream:  # doctest: +SKIP
        ...     for segmented in stream:
        ...         print(segmented.frame.time, segmented.result.coverage)

        Args:
            source: A video file, a camera (``0``, ``"0"``, ``/dev/video0``), a URL (RTSP, RTMP, HTTP, UDP, ...), or
                an :class:`~petseg_runtime.sources.Origin` for more (options for FFmpeg).
            policy: What becomes of a frame for which there is no time; None: ``block`` for what has an end, else
                ``drop-oldest``. See :class:`~petseg_runtime.video.stream.Stream`.
            start: Seconds to pass over, of what has an end; 0 or more.
            stride: Take each so-many-th frame; 1 or more.
            max_frames: End after so many, 1 or more; None: at the source's end.
            mask_only: The frames' own pixels are not wanted: no picture can be made of the results.
            smooth: Against flicker, in [0, 1); see :class:`~petseg_runtime.video.smoothing.Smoother`.
            stall: Seconds without a frame after which a live source is connected anew; above 0.
            patience: Seconds without a frame after which a live source is given up, 0 or more; None: half a minute
                until it has sent one, and never after that.
            tell: Told of each change of a live source's state.

        Returns:
            An iterator over :class:`~petseg_runtime.video.stream.Segmented`, and a context manager; its ``counts`` say
            where frames went. While it is iterated over, too, the errors of a source and an engine may come.

        Raises:
            UsageError: A policy that there is not, or a value out of range; or the URL of a photo (of a camera whose
                URL looks like one, give the :class:`~petseg_runtime.sources.Origin`, with options for FFmpeg).
            InputError: A source that has an end cannot be opened.
        """
        from petseg_runtime.video.live import open_frames  # FFmpeg is loaded for those who read videos
        from petseg_runtime.video.stream import Reading, Stream

        if isinstance(source, Origin):
            origin = source
        else:
            # A number is a camera, even where a file is called so.
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
        """The first step: read a photo, and bring it to the model's size.

        Args:
            source: As for a call.
            mask_only: The photo's own pixels are not kept: no picture can be made of the result.

        Raises:
            InputError: The photo cannot be used.
        """
        with images.open_photo(source, model_size=self.size if mask_only else None) as photo:
            return self.prepare_opened(photo, mask_only=mask_only)

    def prepare_opened(self, photo: images.OpenPhoto, *, mask_only: bool = False) -> Prepared:
        """As :meth:`prepare`, of a photo that is open already; of one decoded at another size no pixels are kept."""
        return prepare_opened(photo, self.size, mask_only=mask_only)

    def infer(self, batch: U8) -> U8:
        """The second step: uint8 [N, H, W, 3] RGB at the model's size to uint8 [N, H, W], ``round(255 * p(pet))``.

        Raises:
            UsageError: The batch is of another shape or type.
            EngineError: The engine failed.
        """
        return self._engine.run(batch)

    def finish(self, prepared: Prepared, probability: U8) -> Segmentation:
        """The last step: bring the answer, uint8 [H, W], to the photo's size, without what is doubtful in it."""
        if not self.keep_doubtful:
            probability = without_doubtful(probability)
        result = finish(prepared, probability, self.threshold, self.cutout_threshold, self.certain_share)
        return result.without_small(self.min_area) if self.min_area else result

    def verify(self, proof: str | os.PathLike[str] | None = None) -> Verification:
        """Prove, in some seconds, that what is loaded does here what it did where it was made.

        This very engine must say of the proof's photos what the model's checkpoint said, and the sample photos must be
        read, resized and given masks of their size as where petseg was made.

        >>> Segmenter().verify().passed  # doctest: +SKIP

        Args:
            proof: The photos and answers; None: ``FILE.parity.npz`` beside the model.

        Raises:
            UsageError: Photos are brought to another size than the proof's.
            ModelError: No proof, or one that is damaged or of another model.
            ParityShapes: The outputs' shapes or types are not the contract's.
        """
        spec = self.artifact.spec
        if self.size != (spec.height, spec.width):
            raise UsageError(
                f"photos are brought to {self.size[0]} x {self.size[1]} here, and the proof is of {spec.height} x "
                f"{spec.width}: verify with a Segmenter without a size"
            )
        from petseg_runtime.verify import verify_engine  # a few programs need it

        return verify_engine(self.artifact, self._engine, Path(proof) if proof is not None else None)

    def describe(self) -> EngineInfo:
        """What is really running."""
        return self._engine.describe()

    @property
    def workers(self) -> int:
        """How many threads read photos, and how many write results, where there are many photos.

        An engine on the CPU shares its threads with them: as many as it has streams. Beside one on a GPU the CPU is
        theirs, and a GPU is fed by several: as many as there are CPU threads, up to :data:`MAX_WORKERS`.
        """
        info = self.describe()
        if info.device == "cpu":
            return info.streams
        return min(self.threads or host.usable_cpus(), MAX_WORKERS)

    def close(self) -> None:
        """Free the model; to use it after that is an ``EngineError``."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, trace)
