"""Checkpoints: one safetensors file with a JSON header, written atomically. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from petseg.config import MOST_LEVELS, is_deep
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg_runtime.artifact import COMPILED
from petseg_runtime.errors import CheckpointError, ModelError, OutputError
from petseg_runtime.files import write_atomic
from petseg_runtime.spec import ModelSpec

__all__ = ["Checkpoint", "load", "load_model", "peek", "save_checkpoint"]

KEY: Final = "petseg"
SCHEMA_VERSION: Final = 1
#: Suffixes of files that are exported from a checkpoint.
EXPORTED: Final = (".onnx", *(suffix for suffix, _ in COMPILED.values()))


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: The tensors by name. A model's parameters and buffers have their state_dict names; a training state
            adds ``ema/...``, ``hints/...`` and ``optimizer/...``.
        meta: The JSON header: ``kind`` (``model`` or ``training``), ``model`` (the network's config), and whatever the
            writer adds (training config, metrics, thresholds).
        sha256: SHA-256 of the file, in hex.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str

    @property
    def model_config(self) -> AttentionUNetConfig:
        """The network's architecture.

        Raises:
            CheckpointError: The header does not describe one.
        """
        try:
            raw: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.meta["model"].items()}
            return AttentionUNetConfig(**raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not describe its network ({error})") from error

    def spec(self) -> ModelSpec | None:
        """Returns a model's input size and thresholds; None for the state of a run, which has none.

        Raises:
            CheckpointError: The height, the width or a threshold is missing, or a value is out of range.
        """
        raw = self.meta.get("spec")
        if raw is None:
            return None
        try:
            # ModelSpec has default thresholds, which were not chosen for this model.
            chosen = {name: raw[name] for name in ("threshold", "cutout_threshold")}
            return ModelSpec(**{"name": "", **raw, **chosen})
        except KeyError as error:
            raise CheckpointError(f"its specification is damaged (it lacks {error})") from error
        except (TypeError, ModelError) as error:
            raise CheckpointError(f"its specification is damaged ({error})") from error


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint to a temporary file and rename it, so that a crash never leaves an incomplete one.

    Args:
        path: The file; its folder is created.
        tensors: Tensors on any device; stored in their dtype, contiguous, from the CPU.
        meta: JSON values; readers expect ``kind`` and ``model``.

    Raises:
        OutputError: It cannot be written (no permission, disk full); an existing file is unchanged.
    """
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    header = json.dumps({"schema_version": SCHEMA_VERSION, **meta}, sort_keys=True)
    try:
        write_atomic(path, save(plain, metadata={KEY: header}))
    except OSError as error:
        raise OutputError(f"{path}: the checkpoint cannot be written ({error.strerror})") from error


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is missing, truncated, not safetensors, not from petseg, or has a newer schema.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        with path.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
    return Checkpoint(tensors, _meta_in(metadata, path), digest)


def peek(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read only the JSON header of a checkpoint (:attr:`Checkpoint.meta`), not its tensors.

    Raises:
        CheckpointError: As :func:`load`.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    return _meta_in(metadata, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors while it is in use become CheckpointErrors."""
    if path.is_fifo():  # opening it would wait for a writer, perhaps forever
        raise CheckpointError(f"{path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError, ValueError) as error:
        if path.is_dir():
            raise CheckpointError(
                f"{path}: a folder; give the checkpoint in it (in a run's folder, best.safetensors)"
            ) from error
        exported = "; an exported file is not a checkpoint: give the .safetensors file that it was made from"
        hint = exported if path.suffix in EXPORTED else ""
        raise CheckpointError(f"{path}: not a readable safetensors checkpoint ({error}){hint}") from error


def _meta_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Parse the JSON in a checkpoint's header."""
    if KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a petseg checkpoint")
    try:
        meta: dict[str, Any] = json.loads(metadata[KEY])
        version = meta.pop("schema_version")
        if is_deep(meta):
            raise ValueError(f"more than {MOST_LEVELS} levels of nested lists and objects")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON header is damaged ({error})") from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint schema_version {version!r}, but this version of petseg reads {SCHEMA_VERSION}; upgrade"
        )
    return meta


def load_model(path: str | os.PathLike[str]) -> tuple[AttentionUNet, Checkpoint]:
    """Load the network of a checkpoint: in evaluation mode, float32, on the CPU.

    From a training state, the EMA weights are loaded, which are those to deploy.

    Raises:
        CheckpointError: As :func:`load`; or tensors are missing, unexpected, or of another shape; or the model's
            specification (:meth:`Checkpoint.spec`) is damaged.
    """
    checkpoint = load(path)
    prefix = "ema/" if checkpoint.meta.get("kind") == "training" else ""
    state = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    try:
        checkpoint.spec()
        # Built without memory, then given the file's tensors: an absurd width in a header allocates nothing.
        with torch.device("meta"):
            model = AttentionUNet(checkpoint.model_config)
        if misfit := _misfit(state, model.state_dict()):
            raise CheckpointError(f"its tensors do not fit the network in its header ({misfit})")
        model.load_state_dict(state, assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its tensors do not fit the network in its header ({error})") from error
    if bad := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{path}: NaN or infinity in {', '.join(bad[:3])}; the training run diverged")
    return model.float().eval(), checkpoint


def _misfit(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Describe the first tensor that differs in name or shape, and how many do; empty if none does.

    PyTorch's own message has a line for each tensor, which hides what a user needs.
    """

    def shape(tensors: dict[str, Tensor], name: str) -> str:
        return str(list(tensors[name].shape)) if name in tensors else "missing"

    names = [name for name in {**expected, **found} if shape(found, name) != shape(expected, name)]
    if not names:
        return ""
    first = f"{names[0]} is {shape(found, names[0])} in the file and {shape(expected, names[0])} in the network"
    return first + (f", and {len(names) - 1} more differ" if len(names) > 1 else "")
