"""What a training run was and what it reached, as one JSON file: the row of a comparison that can be trusted later."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torchvision

from petseg.train import Trainer
from petseg_runtime.errors import OutputError
from petseg_runtime.files import write_atomic

__all__ = ["PUBLISHED_IOU", "RUN", "record", "write_record"]

SCHEMA_VERSION: Final = 1
#: Beside the checkpoints.
RUN: Final = "run.json"
#: What the published network reached on the test split: the mark to which times are taken, on validation.
PUBLISHED_IOU: Final = 0.8375


def record(trainer: Trainer) -> dict[str, Any]:
    """The run so far, all sessions together; JSON values.

    ``seconds`` are those of the wall clock, with reading the photos and validation; what a killed session did after its
    last checkpoint is not in them. ``seconds_to_published_iou`` is null where validation never reached it, and
    ``peak_gpu_memory_bytes`` on a CPU. ``images_per_s`` and ``data_wait`` (a share) are of the steps alone.
    """
    state, meta = trainer.state, trainer.meta
    rows = state.history
    steps = sum(row["seconds"] for row in rows)
    reached = [row for row in rows if row["val_iou"] >= PUBLISHED_IOU]
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": meta["provenance"].get("recipe"),
        "command": meta["provenance"].get("command"),
        "commit": commit(),
        "config": meta["config"],
        "data": meta["data"],
        "teacher": meta.get("teacher"),
        "best": max(rows, key=lambda row: row["val_iou"]),
        "epochs": len(rows),
        "stopped_early": trainer.stopped_early,
        "seconds": state.elapsed,
        "seconds_to_published_iou": reached[0].get("elapsed") if reached else None,
        "images_per_s": state.step * trainer.config.batch / max(steps, 1e-9),
        "data_wait": sum(row["data_wait"] * row["seconds"] for row in rows) / max(steps, 1e-9),
        "peak_gpu_memory_bytes": state.peak_memory or None,
        "processes": trainer.ranks.size,
        "device": meta["device"],
        "precision": meta["precision"],
        "threads": torch.get_num_threads(),
        "versions": {
            **meta["versions"],
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda if trainer.device.type == "cuda" else None,
        },
    }


def write_record(trainer: Trainer) -> None:
    """Write :data:`RUN` into the run's folder.

    Raises:
        OutputError: It cannot be written.
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
    head = _git(here, "rev-parse", "HEAD")
    return head and head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no", ".") else "")


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
