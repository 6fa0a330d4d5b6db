"""The photos of a run: those to train on, decoded in memory or in a file; those to validate on, on the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
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
from petseg.train_set import EpochSampler, TrainSet, decoded_size, refuse_batch
from petseg_runtime.errors import DataError, TrainingError
from petseg_runtime.host import available_memory, usable_cpus
from petseg_runtime.signals import EXITS

__all__ = ["FEW", "RunPhotos", "loader", "workers_of"]

#: Fewer validation photos than these are warned of. With the embedded model and 242 photos, a few of them drawn 400
#: times, the threshold that is best on the few cost 0.8 points of IoU on the others, in the mean, for 5 photos, 0.2 for
#: 20, and 0.1 for 50. The IoU of the few, by which an epoch is chosen, had a standard deviation of 7, 3.5 and 2 points.
FEW: Final = 20

#: Where forked workers put their batches; containers give it 64 MB unless told otherwise.
SHARED: Final = Path("/dev/shm")  # noqa: S108
#: Batches that a worker has there: two made ahead, one being made, one being read.
SHARED_BATCHES: Final = 4

#: Most processes that ``data.workers = "auto"`` starts.
MAX_WORKERS: Final = 16


class RunPhotos:
    """Both parts of a run's photos.

    Attributes:
        train: Those to train on, decoded, with what a teacher says of them, if it is asked in advance.
        val: Those to validate on, whether or not they can be used.
        bad: Names of photos, of both parts, that were left out because they cannot be used.
        warnings: What of the photos makes the run's figures less than they seem; the observer was told each.
        teacher: Which model taught (:attr:`petseg.teacher.Teacher.about`); empty without one.
        init: The same of the checkpoint whose weights the run began with; empty where they were random.
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
    ) -> None:
        """Read those to train on, and look whether those to validate on can be used.

        Args:
            config: The run.
            root: The data folder.
            output: Where a file of the decoded photos goes, if they are too many for the memory.
            device: On which the teacher is asked in advance, if it can be.
            teacher: A checkpoint or exported file; with ``loss.features`` a checkpoint, which is not asked here.
            observer: Told what is read and left out.
            ranks: Which of several processes this is; each reads all photos.

        Raises:
            DataError: The data cannot be used.
            UsageError: A batch cannot be split over the processes.
            ModelError: The teacher cannot be read.
            TrainingError: Another process has other photos.
            OutputError: ``output`` has no room for photos that are too many for the memory.
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
        self.train = self._read(found, config, output, device, teacher)
        kept = {*self.train.names}
        # Those of the weights that the run begins with are added once it is known which these are.
        self._keys = {key for pair in found if pair.name in kept and (key := photo_key(pair))}
        self._agree(device)

    @property
    def good_val(self) -> list[Pair]:
        """Those to validate on, less those that were left out."""
        return [pair for pair in self.val if pair.name not in self.bad]

    @property
    def failed(self) -> Callable[[Pair, DataError], None] | None:
        """What becomes of a photo that cannot be used: with ``data.on_bad=skip`` it is left out, else it ends the run.

        A file can also go bad in the middle of a run.
        """
        return self._leave_out if self._config.on_bad == "skip" else None

    def about(self) -> dict[str, Any]:
        """What every checkpoint says of the photos; JSON values."""
        # Photos that a listing chose can be told by their names alone, those of a share by its seed.
        listed = listed_validation(self._root) is not None
        names = {"val_names": [pair.name for pair in self.val]}
        share = {"val_fraction": self._config.val_fraction, "split_seed": self._config.split_seed}
        return {
            "folder": self._root.absolute().name,  # of "." too
            **(names if listed else share),
            "train_photos": len(self.train),
            "val_photos": len(self.val),
            "skipped_without_pet": self.train.skipped_empty,
            "skipped_too_small": self.train.skipped_tiny,
            "skipped_bad": self.bad,  # the list itself: it can grow at a validation
            "names_sha256": self._names_sha256(),
            "train_keys": "".join(sorted(self._keys)),
            "masks_sha256": hashlib.sha256(encoded(json.dumps(self.masks()))).hexdigest(),
        }

    def masks(self) -> dict[str, dict[str, str]]:
        """By part and name, what tells whether a mask is what it was; without the photos that were left out."""
        train = dict(zip(self.train.names, self.train.masks, strict=True))
        return {str(Split.TRAIN): train, str(Split.VAL): self._val_masks}

    def begin_with(self, init: Path, loaded: checkpoint.Checkpoint) -> None:
        """Note a checkpoint to start from, or refuse one that has seen the photos to validate on.

        Args:
            init: Its file.
            loaded: What is in it.

        Raises:
            TrainingError: It was trained on some of them; the message says which split is right.
        """
        self._refuse_weights(init, loaded.meta)
        test = find_listed(self._root, (Split.TRAINVAL, Split.TEST)).get(Split.TEST, [])
        if seen := trained_on(loaded.meta, self._root, test):
            self._warn(
                f"{init}: it was trained on {len(seen)} of the {len(test)} test photos: what is measured on them "
                "flatters this run"
            )
        self._keys |= train_keys(loaded.meta)
        self.init = {"file": init.name, "identity": loaded.sha256}

    def _refuse_weights(self, init: Path, provenance: Mapping[str, Any]) -> None:
        """Raises TrainingError if a checkpoint was trained on photos to validate on."""
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
            f"validate on its own: {remedy}"
        )

    def _read(
        self, found: Sequence[Pair], config: TrainConfig, output: Path, device: torch.device, teacher: Path | None
    ) -> TrainSet:
        """The photos that were found to train on, decoded; those to validate on are looked at before."""
        d = config.data
        refuse_batch(len(found), config.batch, self._ranks.size)  # there may be fewer yet, once they are read
        once = None if config.loss.features else teacher  # else it is asked at every step
        # Only who sees the mixed picture can say what is in it.
        augment = config.augment if teacher and not once else dataclasses.replace(config.augment, mix=0)
        folder, here = self._place_for(len(found), output, once is not None), self._ranks.here
        self._look_at_val()  # now, not after the first epoch
        if teacher and not once:
            self._note_teacher(*_said_of(teacher))
        remedy = "train without --teacher, or with a smaller one"
        with enough_memory(remedy), open_teacher(once, d.height, d.width, device) as taught:
            if taught:
                self._note_teacher(taught.about, taught.provenance)
                self._observer.started(f"the teacher, in {taught.model.engine}, is asked about each photo once")
            until = math.ceil(round(augment.mix_until * config.epochs, 6))  # 0.55 * 100 is a little more than 55
            return TrainSet(found, d.height, d.width, augment, config.seed, taught, self.failed, folder, here, until)

    def _look_at_val(self) -> None:
        """Raises DataError if no validation photo can be used, or none shows a pet; a few are warned of."""
        with_pet = []
        for pair, _, trimap in usable(self.val, self.failed, self._ranks.here):
            with_pet.append((trimap == PET).any())
            self._val_masks[pair.name] = mask_digest(trimap)
        if not any(with_pet):
            raise DataError(
                f"{self._root}: of the {len(self.val)} validation photos {len(with_pet)} can be used, and none of "
                "those shows a pet, so that no threshold can be chosen: set another data.val_fraction or "
                f"data.split_seed, or list others in {VAL_LISTING}, if it is there"
            )
        if (number := sum(with_pet)) < FEW:
            self._warn(
                f"{number} validation photos with a pet are few to choose the epoch and the threshold by: {FEW} or "
                f"more leave less to chance (a larger data.val_fraction; {VAL_LISTING} in a folder of your own)"
            )

    def _note_teacher(self, about: dict[str, str], provenance: Mapping[str, Any]) -> None:
        self.teacher = about
        if seen := trained_on(provenance, self._root, self.val):
            self._warn(
                f"the teacher was trained on {len(seen)} of the {len(self.val)} validation photos: what is measured on "
                "them flatters this run a little"
            )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self._observer.started(f"warning: {message}")

    def _leave_out(self, pair: Pair, error: DataError) -> None:
        self.bad.append(pair.name)
        self._observer.left_out(f"left out: {error}")

    def _place_for(self, photos: int, output: Path, taught: bool) -> Path | None:
        """The folder for the decoded photos, if those of all processes here take more than half of the free memory."""
        size = self._ranks.here * decoded_size(photos, self._config.height, self._config.width, taught)
        if 2 * size <= available_memory():
            self._observer.started(f"reading {photos} photos into memory")
            return None
        why = f"decoded, they are {size / 1e9:.1f} GB, more than half of the memory that is free"
        self._observer.started(f"reading {photos} photos into a file in {output}: {why}")
        return output

    def _agree(self, device: torch.device) -> None:
        """Raises TrainingError if a process has other photos than another: their batches would not be of one order."""
        if not self._ranks.same(self._names_sha256(), device):
            bad = f"left out {', '.join(self.bad)}" if self.bad else "could read all that it found"
            raise TrainingError(
                "the processes of this run have different photos, so they cannot share batches; process "
                f"{self._ranks.rank} {bad} (`petseg data check` lists what cannot be read)"
            )

    def _names_sha256(self) -> str:
        return names_sha256(self.train.names, self.val)


def _said_of(teacher: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Which checkpoint it is, and what it says of its own training; its tensors are let go."""
    loaded = checkpoint.load(teacher)
    return {"file": teacher.name, "identity": loaded.sha256}, loaded.meta


def loader(
    photos: TrainSet, sampler: EpochSampler, config: TrainConfig, device: torch.device, ranks: Ranks
) -> DataLoader[tuple[Tensor, Tensor, int]]:
    """Batches of the epoch that a sampler is set to, from this process or from workers that outlive the epoch.

    Args:
        photos: What is drawn from.
        sampler: What to draw, in which order.
        config: The run.
        device: What computes.
        ranks: Which of several processes this is.

    Returns:
        Of each batch, this process's part of ``own`` photos: uint8 [own, H, W, 3]; what is known of them, as
        :class:`TrainSet` gives it; and the indices of their names.
    """
    d, own = config.data, config.batch // ranks.size
    batch = decoded_size(own, d.height, d.width, taught=True)  # at most
    workers = workers_of(d.workers, device, batch, ranks.here)
    # A forked worker sees the photos where they are; one started anew, as from Python 3.14 on, would get a copy.
    fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    return DataLoader(
        photos,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        multiprocessing_context="fork" if fork else None,
        persistent_workers=workers > 0,
    )


def workers_of(setting: int | Literal["auto"], device: torch.device, batch: int, processes: int = 1) -> int:
    """How many processes augment for each process of a run on this machine; see :class:`petseg.config.DataConfig`.

    Args:
        setting: ``data.workers``.
        device: What computes.
        batch: Bytes of a batch.
        processes: Of the run, on this machine.
    """
    if isinstance(setting, int):
        return setting
    if device.type != "cuda":
        return 0
    fit = shutil.disk_usage(SHARED).free // (SHARED_BATCHES * batch) if SHARED.is_dir() else MAX_WORKERS
    return max(0, min(usable_cpus() // processes - 2, fit // processes, MAX_WORKERS))


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would take the orderly stop down with it."""
    for number in EXITS:
        signal.signal(number, signal.SIG_IGN)
