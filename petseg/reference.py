"""Checkpoints in PyTorch, float32: the reference that exported files are checked against.

:mod:`petseg.evaluate` imports this module only for checkpoints, because exported files do not need PyTorch.
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
    """Wrap a network as a :data:`petseg.evaluate.Run` that computes in float32."""
    model = model.to(device).eval()

    def run(batch: U8) -> U8:
        # On a GPU, convolutions use TF32 by default, which is not float32 and not the reference.
        exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exactly:
            logits = model(normalize(torch.from_numpy(batch).to(device)))
            probability = torch.round(255 * torch.sigmoid(logits.float().squeeze(1)))
        return probability.to(torch.uint8).cpu().numpy()

    return run


def open_checkpoint(path: Path, device: str = "auto") -> OpenedModel:
    """Open a checkpoint for measuring.

    Args:
        path: The file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CheckpointError: The file cannot be read, or is the state of a run.
        EngineError: The device is not available.
    """
    model, loaded = load_model(path)
    if (spec := loaded.spec()) is None:
        raise CheckpointError(f"{path}: the state of a run, not a model; evaluate the best.safetensors beside it")
    where = pick_device(device)
    return OpenedModel(
        run=torch_run(model, where),
        height=spec.height,
        width=spec.width,
        threshold=spec.threshold,
        file=path.name,
        identity=loaded.sha256,
        engine=f"PyTorch {torch.__version__} on {where}, f32",
        cutout_threshold=spec.cutout_threshold,
        provenance=_origin(model, loaded.meta),
    )


def _origin(model: AttentionUNet, meta: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's provenance, without what OpenedModel has elsewhere, and its number of parameters."""
    return {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        **{name: value for name, value in meta.items() if name not in ("kind", "spec")},
        "border_target": meta["spec"].get("border_target"),
    }
