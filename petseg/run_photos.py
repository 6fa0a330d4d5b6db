"""The photos of a run: training photos, decoded into memory or into a file; validation photos, read when needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from petseg import checkpoint
from petseg.config import TrainConfig
from petseg.data import (
    VAL_LISTING,
    Pair,
    Split,
    encoded,
    find,
    find_listed,
    listed_validation,
    mask_digest,
    names_sha256,
    photo_key,
    usable,
)
from petseg.distributed import Ranks
from petseg.evaluate import split_of, train_keys, trained_on
from petseg.memory import enough_memory
from petseg.metrics import PET
from petseg.observers import Observer
from petseg.teacher import open_teacher
from petseg.train_set import EpochSampler, TrainSet, check_batch, decoded_size
from petseg_runtime.errors import DataError, TrainingError
from petseg_runtime.host import available_memory, usable_cpus
from petseg_runtime.signals import EXITS
from petseg_runtime.text import counted

__all__ = ["FEW", "RunPhotos", "loader", "no_room_for_workers", "workers_of"]

#: With fewer validation photos than this, a warning is given. With the built-in model and 242 photos, from which a few
#: were drawn 400 times, the threshold that is best on the few cost on average 0.8 points of IoU on the others for 5
#: photos, 0.2 for 20, and 0.1 for 50. The IoU of the few, by which the best epoch is chosen, had a standard deviation
#: of 7, 3.5 and 2 points.
FEW: Final = 20

#: Where dataloader workers put their batches; containers have 64 MB there by default.
SHARED: Final = Path("/dev/shm")  # noqa: S108
#: Batches of one worker there: PyTorch asks each for two at a time, and one may be in use.
SHARED_BATCHES: Final = 3

#: The most workers that ``data.workers = "auto"`` starts.
MAX_WORKERS: Final = 16


class RunPhotos:
    """The training and validation photos of a run.

    Attributes:
        train: The training photos, decoded, with a teacher's probabilities if it is run on each photo once.
        val: The validation photos, whether or not they can be used.
        bad: Names of photos, of both parts, that were excluded because they cannot be used.
        warnings: Why the figures of the run may be worse than they look; each was also reported to the observer.
        teacher: The teacher's file and identity (:attr:`petseg.teacher.Teacher.about`); empty without one.
        init: The same for the checkpoint that the run started from; empty for random weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        root: Path,
        output: Path,
        *,
        device: torch.device,
        teacher: Path | None,
        observer: Observer,
        ranks: Ranks,
        without: Collection[str] = (),
    ) -> None:
        """Decode the training photos, and check that the validation photos can be used.

        Args:
            config: The settings of the run.
            root: The data folder.
            output: The folder for a file of decoded photos, if they do not fit into memory.
            device: The device for running the teacher on each photo once, if it has an engine for that.
            teacher: A checkpoint or exported file; with ``loss.features`` a checkpoint, which is not run here.
            observer: Receives messages about what is read and excluded.
            ranks: Rank and world size; each rank reads all photos.
            without: Names of photos to exclude unread, because the run to resume had excluded them: it would be another
                run with those that can be used again.

        Raises:
            DataError: The data cannot be used.
            UsageError: The batch cannot be split evenly over the ranks.
            ModelError: The teacher cannot be read.
            TrainingError: Another rank has different photos.
            OutputError: The photos do not fit into memory, and ``output`` has no room for them.
        """
        self.bad: list[str] = []
        self.warnings: list[str] = []
        self.teacher: dict[str, str] = {}
        self.init: dict[str, str] = {}
        self._val_masks: dict[str, str] = {}
        self._config, self._root, self._observer, self._ranks = config.data, root, observer, ranks
        found, self.val = (
            find(root, split, val_fraction=config.data.val_fraction, seed=config.data.split_seed)
            for split in (Split.TRAIN, Split.VAL)
        )
        self._exclude_again(without, {pair.name for pair in (*found, *self.val)})
        found = [pair for pair in found if pair.name not in self.bad]
        self.train = self._read(found, config, output, device, teacher)
        kept = {*self.train.names}
        # Those of the initial weights are added later, by start_from.
        self._keys = {key for pair in found if pair.name in kept and (key := photo_key(pair))}
        self._check_same_photos(device)

    @property
    def good_val(self) -> list[Pair]:
        """The validation photos without the excluded ones."""
        return [pair for pair in self.val if pair.name not in self.bad]

    @property
    def failed(self) -> Callable[[Pair, DataError], None] | None:
        """The callback for photos that cannot be used: excludes them if ``data.on_bad=skip``, else None (an error).

        A file can also become unreadable in the middle of a run.
        """
        return self._exclude if self._config.on_bad == "skip" else None

    def about(self) -> dict[str, Any]:
        """Returns what every checkpoint says about the photos; JSON values."""
        # Validation photos from a listing are identified by their names, those chosen by seed by fraction and seed.
        listed = listed_validation(self._root) is not None
        names = {"val_names": [pair.name for pair in self.val]}
        share = {"val_fraction": self._config.val_fraction, "split_seed": self._config.split_seed}
        return {
            "folder": self._root.absolute().name,  # also for "."
            **(names if listed else share),
            "train_photos": len(self.train),
            "val_photos": len(self.val),
            "skipped_without_pet": self.train.skipped_empty,
            "skipped_too_small": self.train.skipped_tiny,
            "skipped_bad": self.bad,  # the list object itself: it can grow during a validation
            "names_sha256": self._names_sha256(),
            "train_keys": "".join(sorted(self._keys)),
            "masks_sha256": hashlib.sha256(encoded(json.dumps(self.masks()))).hexdigest(),
        }

    def masks(self) -> dict[str, dict[str, str]]:
        """Returns the digests of the masks, by part and name; without the excluded photos."""
        train = dict(zip(self.train.names, self.train.masks, strict=True))
        return {str(Split.TRAIN): train, str(Split.VAL): self._val_masks}

    def start_from(self, init: Path, loaded: checkpoint.Checkpoint) -> None:
        """Record the checkpoint to start from; reject one that was trained on the validation photos.

        Args:
            init: Its file.
            loaded: Its content.

        Raises:
            TrainingError: It was trained on some of them; the message says which split to use.
        """
        self._check_unseen_val(init, loaded.meta)
        test = find_listed(self._root, (Split.TRAINVAL, Split.TEST)).get(Split.TEST, [])
        if seen := trained_on(loaded.meta, self._root, test):
            self._warn(
                f"{init}: it was trained on {len(seen)} of the {len(test)} test photos, so figures measured on "
                "them are optimistic for this run"
            )
        self._keys |= train_keys(loaded.meta)
        self.init = {"file": init.name, "identity": loaded.sha256}

    def _check_unseen_val(self, init: Path, provenance: Mapping[str, Any]) -> None:
        """Raises TrainingError if a checkpoint was trained on validation photos of this run."""
        seen = trained_on(provenance, self._root, self.val)
        if not seen:
            return
        remedy = f"list in {VAL_LISTING} the photos that it was validated on, or others that it has not seen"
        if (split := split_of(provenance)) and listed_validation(self._root) is None:
            own = find(self._root, Split.VAL, val_fraction=split[0], seed=split[1])
            if not trained_on(provenance, self._root, own):
                remedy = f"--set data.val_fraction={split[0]:g} --set data.split_seed={split[1]}"
        raise TrainingError(
            f"{init}: it was trained on {len(seen)} of the {len(self.val)} photos that this run would be validated on; "
            f"validate on the photos that it was validated on: {remedy}"
        )

    def _read(
        self, found: Sequence[Pair], config: TrainConfig, output: Path, device: torch.device, teacher: Path | None
    ) -> TrainSet:
        """Check the validation photos, then decode the training photos that were found."""
        d = config.data
        check_batch(len(found), config.batch, self._ranks.size)  # fewer may remain once they have been read
        once = None if config.loss.features else teacher  # otherwise the teacher is run at every step
        # Only a teacher that sees the mixed picture can provide its target.
        augment = config.augment if teacher and not once else dataclasses.replace(config.augment, mix=0)
        folder, here = self._storage_for(len(found), output, once is not None), self._ranks.here
        self._check_val()  # now rather than after the first epoch
        if teacher and not once:
            self._note_teacher(*_identify(teacher))
        alone = "use a smaller --size, or a machine with more memory"
        remedy = "train without --teacher, or with a smaller one" if once else alone
        with enough_memory(remedy), open_teacher(once, d.height, d.width, device) as taught:
            if taught:
                self._note_teacher(taught.about, taught.model.provenance)
                self._observer.started(f"running the teacher ({taught.model.engine}) on each photo once")
            until = math.ceil(round(augment.mix_until * config.epochs, 6))  # 0.55 * 100 is slightly more than 55
            return TrainSet(found, d.height, d.width, augment, config.seed, taught, self.failed, folder, here, until)

    def _check_val(self) -> None:
        """Raises DataError if no validation photo can be used, or none shows a pet; warns if there are few."""
        with_pet = []
        for pair, _, trimap in usable(self.good_val, self.failed, self._ranks.here):
            with_pet.append((trimap == PET).any())
            self._val_masks[pair.name] = mask_digest(trimap)
        if not any(with_pet):
            raise DataError(
                f"{self._root}: of the {len(self.val)} validation photos {len(with_pet)} can be used, and none of "
                "those shows a pet, so no threshold can be chosen; set another data.val_fraction or data.split_seed, "
                f"or list others in {VAL_LISTING}, if it is there"
            )
        if (number := sum(with_pet)) < FEW:
            self._warn(
                f"only {counted(number, 'validation photo')} with a pet to choose the epoch and the threshold on; use "
                f"{FEW} or more (a larger data.val_fraction, or {VAL_LISTING} in your own data folder)"
            )

    def _note_teacher(self, about: dict[str, str], provenance: Mapping[str, Any]) -> None:
        self.teacher = about
        if seen := trained_on(provenance, self._root, self.val):
            self._warn(
                f"the teacher was trained on {len(seen)} of the {len(self.val)} validation photos, so figures "
                "measured on them are slightly optimistic for this run"
            )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self._observer.started(f"warning: {message}")

    def _exclude(self, pair: Pair, error: DataError) -> None:
        self.bad.append(pair.name)
        self._observer.excluded(f"excluded: {error}")

    def _exclude_again(self, before: Collection[str], there: Set[str]) -> None:
        """Exclude the photos that are there of those that the run to resume had excluded before."""
        for name in before:
            if name in there:
                self.bad.append(name)
                self._observer.excluded(f"excluded, as before the run was resumed: {name}")

    def _storage_for(self, photos: int, output: Path, taught: bool) -> Path | None:
        """Returns the folder for the decoded photos, if all ranks here together need more than half of free memory."""
        size = self._ranks.here * decoded_size(photos, self._config.height, self._config.width, taught)
        if 2 * size <= available_memory():
            self._observer.started(f"reading {counted(photos, 'photo')} into memory")
            return None
        why = f"decoded, they take {size / 1e9:.1f} GB, more than half of the free memory"
        self._observer.started(f"reading {counted(photos, 'photo')} into a file in {output}: {why}")
        return output

    def _check_same_photos(self, device: torch.device) -> None:
        """Raises TrainingError if the ranks have different photos: the order of their batches would differ."""
        if not self._ranks.same(self._names_sha256(), device):
            bad = f"excluded {', '.join(self.bad)}" if self.bad else "could read all that it found"
            raise TrainingError(
                "the processes of this run have different photos, so they cannot share batches; rank "
                f"{self._ranks.rank} {bad} (`petseg data check` lists unreadable photos)"
            )

    def _names_sha256(self) -> str:
        return names_sha256(self.train.names, self.val)


def _identify(teacher: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns a teacher checkpoint's file and identity, and its provenance; does not keep its tensors."""
    loaded = checkpoint.load(teacher)
    return {"file": teacher.name, "identity": loaded.sha256}, loaded.meta


def loader(
    photos: TrainSet, sampler: EpochSampler, config: TrainConfig, device: torch.device, ranks: Ranks
) -> DataLoader[tuple[Tensor, Tensor, int]]:
    """Returns a DataLoader for the epoch that the sampler is set to; its workers persist between epochs.

    Args:
        photos: The training photos.
        sampler: Draws this rank's part of each batch.
        config: The settings of the run.
        device: The device to train on.
        ranks: Rank and world size.

    Returns:
        Yields this rank's part of each batch, ``own`` photos: images, uint8 [own, H, W, 3]; labels, as
        :class:`TrainSet` returns them; and the indices of the photos' names.
    """
    workers = workers_of(config.data.workers, device, _batch_bytes(photos, config, ranks), ranks.here)
    return DataLoader(
        photos,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        # Forked workers share the photos' memory; with another start method, Python 3.14's default, they copy it.
        multiprocessing_context="fork" if workers else None,
        persistent_workers=workers > 0,
    )


def workers_of(setting: int | Literal["auto"], device: torch.device, batch: int, processes: int = 1) -> int:
    """Returns the number of dataloader workers for each rank; see :class:`petseg.config.DataConfig`.

    Args:
        setting: ``data.workers``.
        device: The device to train on.
        batch: Bytes of a batch.
        processes: Ranks on this machine.
    """
    if isinstance(setting, int):
        return setting
    if device.type != "cuda":
        return 0
    return min(_by_cores(processes), _by_room(batch, processes))


def no_room_for_workers(photos: TrainSet, config: TrainConfig, device: torch.device, ranks: Ranks) -> str | None:
    """Says for how many workers /dev/shm has room, if that is fewer than ``data.workers=auto`` would start; else None.

    Args:
        photos: The training photos.
        config: The settings of the run.
        device: The device to train on.
        ranks: Rank and world size.
    """
    batch, wanted = _batch_bytes(photos, config, ranks), _by_cores(ranks.here)
    if config.data.workers != "auto" or device.type != "cuda" or (fit := _by_room(batch, ranks.here)) >= wanted:
        return None
    free = shutil.disk_usage(SHARED).free / 1e6
    # A gigabyte more than the batches take: others, such as NCCL, put their data there, too.
    enough = 1 + math.ceil(wanted * ranks.here * SHARED_BATCHES * batch / 2**30)
    return (
        f"room for {counted(fit, 'dataloader worker')} in {SHARED} ({free:.0f} MB); docker run --shm-size={enough}g "
        f"makes room for {wanted}"
    )


def _batch_bytes(photos: TrainSet, config: TrainConfig, ranks: Ranks) -> int:
    """Returns the bytes of a rank's part of a batch."""
    return decoded_size(config.batch // ranks.size, config.data.height, config.data.width, photos.taught)


def _by_cores(processes: int) -> int:
    """Returns the number of workers for each of some ranks that share the cores."""
    return max(0, min(usable_cpus() // processes - 2, MAX_WORKERS))


def _by_room(batch: int, processes: int) -> int:
    """Returns the number of workers of each rank whose batches have room."""
    return shutil.disk_usage(SHARED).free // (SHARED_BATCHES * batch * processes) if SHARED.is_dir() else MAX_WORKERS


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in a worker: Ctrl-C reaches the whole process group, and a killed worker would break the stop."""
    for number in EXITS:
        signal.signal(number, signal.SIG_IGN)
