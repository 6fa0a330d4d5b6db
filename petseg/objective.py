"""The training objective: the loss against the ground truth, a teacher's probabilities and a teacher's features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petseg.config import TrainConfig
from petseg.distributed import Ranks
from petseg.losses import DICE_LOSSES, bce_dice
from petseg.model import AttentionUNet
from petseg.train_set import UNKNOWN, target_of

__all__ = ["Distillation", "Objective"]


class Objective:
    """The loss against the ground truth, or a mix of it with a teacher's probabilities from before training.

    Attributes:
        hints: Modules that are trained with the network and dropped after training; none here.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """The objective of a run, on this rank."""
        self.loss, self.border_target, self.ranks = config.loss, config.data.border_target, ranks
        self.hints = nn.ModuleList()

    def student(self, network: AttentionUNet) -> nn.Module:
        """Returns the module that a step passes as ``forward``; it shares the network's weights."""
        return network

    def __call__(self, forward: Callable[[Tensor], Any], image: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, a float32 scalar.

        Args:
            forward: The :meth:`student`, possibly compiled or wrapped in DDP.
            image: The network's input, float [N, 3, H, W].
            labels: uint8, as :class:`petseg.train_set.TrainSet` returns them.
        """
        logits: Tensor = forward(image)
        return self._loss_against(target_of(labels, self.border_target, self.loss.teacher), logits)

    def _loss_against(self, target: Tensor, logits: Tensor) -> Tensor:
        w = self.loss
        return bce_dice(logits, target, w.bce, w.dice, w.epsilon, self.ranks.sum, DICE_LOSSES[w.dice_form])


class Distillation(Objective):
    """The loss against the ground truth and a teacher's probabilities, and the distance to the teacher's features.

    The teacher is run at every step on the same augmented picture as the network: a consistent teacher (Beyer et al.
    2022, "Knowledge distillation: A good teacher is patient and consistent", arXiv:2106.05237). For two mixed photos
    (``augment.mix``), which have no labels, the target consists of its probabilities only. Its features are hints
    (Romero et al. 2015, "FitNets", arXiv:1412.6550, eq. 3): 1x1 convolutions map the network's features to them, and
    are dropped after training. The hints are the features of the three coarsest blocks (the last before the bottom, the
    bottom, the first after it), which represent what a thing is rather than where it ends. They are resized to those of
    the network, and standardized to mean 0 and standard deviation 1 per channel over the batch of all ranks, so that no
    channel outweighs another.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, network: AttentionUNet, teacher: AttentionUNet, device: torch.device
    ) -> None:
        """The objective of a run.

        Args:
            config: The settings of the run.
            ranks: Rank and world size.
            network: The network that is trained, on its device.
            teacher: Any network with these blocks. It is moved to the device, and never trained.
            device: The device of the run.
        """
        super().__init__(config, ranks)
        self.teacher = teacher.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        image = torch.zeros(1, 3, config.data.height, config.data.width, device=device)
        widths = zip(_widths(network, image), _widths(teacher, image), strict=True)
        hints = nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for inputs, outputs in widths)
        self.hints = hints.to(device).to(memory_format=torch.channels_last)

    def student(self, network: AttentionUNet) -> nn.Module:
        """Returns the network together with its hints."""
        return _Hinted(network, self.hints)

    def __call__(self, forward: Callable[[Tensor], Any], image: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Objective.__call__`."""
        with torch.no_grad():
            said, blocks = _coarsest(self.teacher, image)
        logits, hinted = forward(image)
        share = torch.where(labels == UNKNOWN, 1.0, self.loss.teacher).unsqueeze(1)
        target = target_of(labels, self.border_target).lerp(torch.sigmoid(said.float()), share)
        loss = self._loss_against(target, logits)
        apart = [
            F.mse_loss(own.float(), self._standardized(F.adaptive_avg_pool2d(block.float(), own.shape[-2:])))
            for own, block in zip(hinted, blocks, strict=True)
        ]
        return loss + self.loss.features * torch.stack(apart).mean()

    def _standardized(self, block: Tensor) -> Tensor:
        """Standardize features [N, C, H, W] to mean 0, standard deviation 1 per channel over the batch of all ranks."""
        count = self.ranks.size * block.numel() // block.shape[1]
        mean = self.ranks.sum(block.sum((0, 2, 3), keepdim=True)) / count
        centred = block - mean
        variance = self.ranks.sum(centred.square().sum((0, 2, 3), keepdim=True)) / count
        return centred * torch.rsqrt(variance + 1e-5)  # a constant channel becomes 0


class _Hinted(nn.Module):
    """A network, with the convolutions that map its features to its teacher's."""

    def __init__(self, network: AttentionUNet, hints: nn.ModuleList) -> None:
        super().__init__()
        self.network, self.hints = network, hints

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits [N, 1, H, W], and the coarsest blocks' features mapped by the hints."""
        logits, blocks = _coarsest(self.network, image)
        return logits, [hint(block) for hint, block in zip(self.hints, blocks, strict=True)]


def _coarsest(network: AttentionUNet, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits, and the features of the last block before the bottom, the bottom, and the first after it."""
    logits, blocks = network.with_features(image)
    last = len(network.config.channels) - 1
    return logits, [blocks[name] for name in (f"down{last}", "bottom", f"up{last}")]


def _widths(network: AttentionUNet, image: Tensor) -> list[int]:
    """Returns the channels of those blocks; leaves the network unchanged."""
    training = network.training
    with torch.no_grad():
        _, blocks = _coarsest(network.eval(), image)
    network.train(training)
    return [block.shape[1] for block in blocks]
