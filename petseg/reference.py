"""A checkpoint in PyTorch, float32: the reference that exported files are held against.

Measuring an exported file needs none of this, so :mod:`petseg.evaluate` imports it for a checkpoint only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from petseg.checkpoint import load_model
from petseg.device import pick_device
from petseg.evaluate import U8, OpenedModel, Run
from petseg.model import AttentionUNet, normalize
from petseg_runtime.errors import CheckpointError

__all__ = ["open_checkpoint", "torch_run"]


def torch_run(model: AttentionUNet, device: torch.device | str = "cpu") -> Run:
    """A network in PyTorch, float32, as a :data:`petseg.evaluate.Run`."""
    model = model.to(device).eval()

    def run(batch: U8) -> U8:
        # On a GPU, convolutions would use TF32 unless told otherwise: not float32, and not the reference.
        exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exactly:
            logits = model(normalize(torch.from_numpy(batch).to(device)))
            probability = torch.round(255 * torch.sigmoid(logits.float().squeeze(1)))
        return probability.to(torch.uint8).cpu().numpy()

    return run


def open_checkpoint(path: Path, device: str = "auto") -> OpenedModel:
    """A checkpoint, ready to be measured.

    Args:
        path: The file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CheckpointError: It cannot be read, or is the state of a run.
        EngineError: The device cannot be had.
    """
    model, loaded = load_model(path)
    if (spec := loaded.spec()) is None:
        raise CheckpointError(f"{path}: the state of a run, not a model; evaluate best.safetensors beside it")
    where = pick_device(device)
    return OpenedModel(
        run=torch_run(model, where),
        height=spec.height,
        width=spec.width,
        threshold=spec.threshold,
        file=path.name,
        identity=loaded.sha256,
        engine=f"PyTorch {torch.__version__} on {where}, f32",
        cutout_threshold=loaded.meta["spec"].get("cutout_threshold"),  # older ones have none
        provenance=_origin(model, loaded.meta),
    )


def _origin(model: AttentionUNet, meta: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, less what is said elsewhere, and how large its network is."""
    return {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        **{name: value for name, value in meta.items() if name not in ("kind", "spec")},
        "border_target": meta["spec"].get("border_target"),
    }
