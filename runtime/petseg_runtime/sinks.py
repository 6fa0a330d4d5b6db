"""Where results go: one picture per photo, in folders like the photos' own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from petseg_runtime.errors import InputError, OutputError
from petseg_runtime.files import replacing
from petseg_runtime.result import Segmentation
from petseg_runtime.sources import Item

__all__ = ["KINDS", "ImageSink"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One form of result."""

    suffix: str
    render: Callable[[Segmentation], Image.Image]
    options: dict[str, Any]


#: What ``--as`` offers.
KINDS: Final = {
    # compress_level 1: a third of the time of the default 6, for files a few per cent larger
    "mask": Kind(suffix=".png", render=Segmentation.mask_image, options={"compress_level": 1}),
    "probability": Kind(suffix=".png", render=Segmentation.probability_image, options={"compress_level": 1}),
    "cutout": Kind(suffix=".png", render=Segmentation.cutout, options={"compress_level": 1}),
    "overlay": Kind(suffix=".jpg", render=Segmentation.overlay, options={"quality": 92}),
}

#: No later photo could be written either: the run stops instead of failing a thousand times.
_HOPELESS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class ImageSink:
    """Writes one picture per photo below a folder; each is whole or not there."""

    def __init__(self, output: Path, kind: str, items: Sequence[Item]) -> None:
        """Make the folder, and make sure that it can be written to and that no photo would be overwritten.

        An earlier run's results are replaced, except beside the photos: there a file of that name may be somebody's.

        Args:
            output: The folder.
            kind: A name in :data:`KINDS`.
            items: What will be written.

        Raises:
            OutputError: The folder cannot be written to, or a result would replace a photo or a file beside one.
        """
        self._output, self._kind = output, KINDS[kind]
        photos = {os.path.realpath(item.source) for item in items}  # Path.resolve raises on a loop of links
        folders = {str(Path(photo).parent) for photo in photos}
        for item in items:
            if os.path.realpath(path := self.path_of(item)) in photos:
                raise OutputError(f"{path}: the result of {item.source} would replace a photo; choose another --output")
            if os.path.realpath(path.parent) in folders and path.exists():
                raise OutputError(f"{path}: there already, beside the photos; move it, or choose another --output")
        try:
            with replacing(output / ".petseg-probe") as probe:
                probe.touch()
            (output / ".petseg-probe").unlink()
        except OSError as error:
            raise OutputError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from error

    def path_of(self, item: Item) -> Path:
        """Where an item's result goes."""
        name = self._output / item.name
        return name.with_name(name.name + self._kind.suffix)

    def write(self, item: Item, result: Segmentation) -> Path:
        """Write an item's result.

        Raises:
            InputError: This one cannot be written (its name is too long, for example).
            OutputError: Nothing more can be written (the disk is full).
        """
        path = self.path_of(item)
        try:
            with replacing(path) as beside:
                self._kind.render(result).save(beside, **self._kind.options)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in _HOPELESS:
                raise OutputError(f"{path}: cannot be written ({reason})") from error
            raise InputError(f"{item.source}: its result {path} cannot be written ({reason})") from error
        return path
