"""What a training run was and what it reached, as one JSON file: the row of a comparison that can be trusted later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import petseg_runtime
from petseg.evaluate import without_keys
from petseg.log import Row
from petseg.metrics import PUBLISHED
from petseg.train import Trainer
from petseg_runtime.errors import OutputError
from petseg_runtime.files import write_atomic

__all__ = ["PUBLISHED_IOU", "RUN", "commit", "reached", "record", "write_record"]

SCHEMA_VERSION: Final = 2
#: Beside the checkpoints.
RUN: Final = "run.json"
#: What the published network reached on the test split: the mark to which times are taken, on validation.
PUBLISHED_IOU: Final = PUBLISHED["iou"]


def record(trainer: Trainer) -> dict[str, Any]:
    """The run so far, all sessions together; JSON values. See :func:`reached`.

    ``best`` is what the best checkpoint says of itself, which may be of an epoch that a crash took from the log.

    ``commit`` is that of the run's start: people commit while it runs. ``elapsed`` is without what a killed session did
    after its last checkpoint, and ``peak_gpu_memory_bytes`` is null on a CPU.

    Raises:
        CheckpointError: The best checkpoint is gone, or damaged.
    """
    state, meta = trainer.state, trainer.meta
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: meta["provenance"].get(name) for name in ("recipe", "command", "commit")},
        "config": meta["config"],
        "data": without_keys(meta["data"]),
        "teacher": meta.get("teacher"),
        "init": meta.get("init"),
        **reached(state.history, trainer.config.batch),
        "best": trainer.best.as_dict(),
        "elapsed": state.elapsed,
        "stopped_early": trainer.stopped_early,
        "warnings": trainer.warnings,
        "peak_gpu_memory_bytes": state.peak_memory or None,
        "processes": trainer.ranks.size,
        "device": meta["device"],
        "precision": meta["precision"],
        "threads": torch.get_num_threads(),
        "versions": {
            **meta["versions"],
            "torchvision": importlib.metadata.version("torchvision"),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda if trainer.device.type == "cuda" else None,
        },
    }


def reached(rows: Sequence[Row], batch: int) -> dict[str, Any]:
    """What the rows of a log come to; JSON values.

    Args:
        rows: One for each epoch, at least one.
        batch: Photos per step.

    Returns:
        ``epochs``; ``best``, the row with the highest validation IoU; ``elapsed``, seconds of the wall clock up to the
        last validation, with reading the photos, validating and saving; ``seconds``, those of the steps alone, which
        ``images_per_s`` and ``data_wait`` (the share of waiting for photos) are of; ``validation_reached_published``,
        the first epoch at which the IoU on *validation* photos was the published one, which was measured on test
        photos, or null. Elapsed seconds are null where the log is of a version that did not take them.
    """
    seconds = sum(row.seconds for row in rows)
    first = next((row for row in rows if row.val_iou >= PUBLISHED_IOU), None)
    return {
        "epochs": len(rows),
        "best": max(rows, key=lambda row: row.val_iou).as_dict(),
        "elapsed": rows[-1].elapsed,
        "seconds": seconds,
        "images_per_s": rows[-1].step * batch / max(seconds, 1e-9),
        "data_wait": sum(row.data_wait * row.seconds for row in rows) / max(seconds, 1e-9),
        "validation_reached_published": None
        if first is None
        else {"val_iou_at_least": PUBLISHED_IOU, "epoch": first.epoch, "elapsed": first.elapsed},
    }


def write_record(trainer: Trainer) -> None:
    """Write :data:`RUN` into the run's folder.

    Raises:
        OutputError: It cannot be written.
        CheckpointError: See :func:`record`.
    """
    path = trainer.output / RUN
    try:
        write_atomic(path, (json.dumps(record(trainer), indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def commit() -> str | None:
    """The commit of petseg, with ``+`` where files were changed since; null where it does not run from a checkout."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:  # a checkout of something else
        return None
    head, top = _git(here, "rev-parse", "HEAD"), _git(here, "rev-parse", "--show-toplevel")
    if not head or not top:
        return None
    # Photos are decoded and resized by the runtime: a change there makes another run, too.
    ours = (here, Path(petseg_runtime.__file__).resolve().parent)
    folders = [str(folder) for folder in ours if folder.is_relative_to(Path(top).resolve())]
    return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", *folders) else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 (our own words)
            ["git", "-C", str(folder), *words],  # noqa: S607 (the user's git)
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
