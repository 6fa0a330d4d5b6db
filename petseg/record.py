"""``run.json``: the settings and results of a training run, so that it can be compared with others later."""

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
from petseg.run_state import RUN
from petseg.train import Trainer
from petseg_runtime.errors import OutputError
from petseg_runtime.files import write_atomic

__all__ = ["PUBLISHED_IOU", "RUN", "commit", "reached", "record", "write_record"]

SCHEMA_VERSION: Final = 2
#: Test IoU of the published network; the record has the time at which the validation IoU reaches it.
PUBLISHED_IOU: Final = PUBLISHED["iou"]


def record(trainer: Trainer) -> dict[str, Any]:
    """Returns the record of the run so far, over all sessions; JSON values. See :func:`reached`.

    ``best`` is the validation row in the best checkpoint; a crash may have removed its epoch from the log.

    ``commit`` is the one at the start of the run, because commits may be made while it runs. ``elapsed`` does not
    include the time of a killed session after its last checkpoint; ``peak_gpu_memory_bytes`` is null on a CPU.

    Raises:
        CheckpointError: The best checkpoint is missing or damaged.
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
    """Summarize the rows of a log; JSON values.

    Args:
        rows: One per epoch, at least one.
        batch: Photos per step.

    Returns:
        ``epochs``; ``best``, the row with the highest validation IoU; ``elapsed``, seconds of wall-clock time up to the
        last validation, including reading the photos, validation and saving; ``seconds``, those of the steps only, to
        which ``images_per_s`` and ``data_wait`` (the share of waiting for photos) refer;
        ``validation_reached_published``, the first epoch whose IoU on *validation* photos reached the published one,
        which was measured on test photos, or null.
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
    """Returns the commit of petseg, with ``+`` if files were changed since; None if it does not run from a checkout."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:  # the checkout of another project
        return None
    head, top = _git(here, "rev-parse", "HEAD"), _git(here, "rev-parse", "--show-toplevel")
    if not head or not top:
        return None
    # The runtime decodes and resizes the photos, so a change there makes a different run, too.
    ours = (here, Path(petseg_runtime.__file__).resolve().parent)
    folders = [str(folder) for folder in ours if folder.is_relative_to(Path(top).resolve())]
    return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", *folders) else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments)
            ["git", "-C", str(folder), *words],  # noqa: S607 (the user's git)
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
