"""Initial weights for a network: random ones, or those of a checkpoint, as far as they fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from petseg import checkpoint
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.run_photos import RunPhotos
from petseg_runtime.errors import CheckpointError

__all__ = ["first_weights"]


def first_weights(
    config: AttentionUNetConfig, init: Path | None, photos: RunPhotos, say: Callable[[str], None]
) -> AttentionUNet:
    """Build the network that a run starts with, on the CPU; random weights come from PyTorch's global generator.

    Args:
        config: The architecture.
        init: A checkpoint of this architecture, or of another one, of which the tensors that fit are used.
        photos: The photos of the run; they record the checkpoint, and reject one trained on validation photos.
        say: Called with a message about which tensors fit, if not all do.

    Raises:
        CheckpointError: ``init`` cannot be read, or fewer than half of the network's tensors fit.
        TrainingError: ``init`` was trained on photos that the run validates on.
    """
    if init is None:
        return AttentionUNet(config)
    given, loaded = checkpoint.load_model(init)
    photos.start_from(init, loaded)
    if loaded.model_config == config:
        return given
    model = AttentionUNet(config)
    own = model.state_dict()
    fits = {n: t for n, t in given.state_dict().items() if n in own and t.shape == own[n].shape}
    if 2 * len(fits) < len(own):
        raise CheckpointError(
            f"{init}: its network is {loaded.model_config}, but this run's is {config}: only {len(fits)} of {len(own)} "
            "tensors fit"
        )
    model.load_state_dict(fits, strict=False)
    say(f"{len(fits)} tensors from {init.name}; random: {', '.join(sorted(own.keys() - fits))}")
    return model
