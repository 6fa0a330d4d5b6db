"""A network with its first weights: random ones, or those of a checkpoint, as far as they fit."""

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
    """The network that a run starts with, on the CPU; random weights come from PyTorch's own generator.

    Args:
        config: Its shape.
        init: A checkpoint, which gives all its tensors, or of another shape those that fit.
        photos: The run's, some of which the checkpoint must not have seen; they note which it is.
        say: Told which tensors fit, if not all do.

    Raises:
        CheckpointError: ``init`` cannot be read, or fewer than half of the tensors fit.
        TrainingError: It was trained on photos that the run validates on.
    """
    if init is None:
        return AttentionUNet(config)
    given, loaded = checkpoint.load_model(init)
    photos.begin_with(init, loaded)
    if loaded.model_config == config:
        return given
    model = AttentionUNet(config)
    own = model.state_dict()
    fits = {n: t for n, t in given.state_dict().items() if n in own and t.shape == own[n].shape}
    if 2 * len(fits) < len(own):
        raise CheckpointError(
            f"{init}: a network of {loaded.model_config}, this run is of {config}: only {len(fits)} of {len(own)} "
            "tensors fit"
        )
    model.load_state_dict(fits, strict=False)
    say(f"of {init.name} {len(fits)} tensors; random: {', '.join(sorted(own.keys() - fits))}")
    return model
