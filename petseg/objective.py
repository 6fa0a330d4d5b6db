"""What a step minimises: the loss against the truth, against what a teacher says, and against what it has inside."""

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
    """The loss against the truth, a part of which may be what a teacher said of each photo before training.

    Attributes:
        hints: What is trained beside the network and not kept after it; nothing here.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """The objective of a run, of one of whose processes this is."""
        self.loss, self.border_target, self.ranks = config.loss, config.data.border_target, ranks
        self.hints = nn.ModuleList()

    def student(self, network: AttentionUNet) -> nn.Module:
        """What is called in a step in place of the network, by this class alone; the weights are the network's own."""
        return network

    def __call__(self, forward: Callable[[Tensor], Any], image: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a float32 scalar.

        Args:
            forward: The :meth:`student`, perhaps compiled, or shared by several processes.
            image: What the network is given, float [N, 3, H, W].
            labels: What is known of it, uint8, as :class:`petseg.train_set.TrainSet` gives it.
        """
        logits: Tensor = forward(image)
        return self._against(target_of(labels, self.border_target, self.loss.teacher), logits)

    def _against(self, target: Tensor, logits: Tensor) -> Tensor:
        w = self.loss
        return bce_dice(logits, target, w.bce, w.dice, w.epsilon, self.ranks.sum, DICE_LOSSES[w.dice_form])


class Distillation(Objective):
    """The loss against the truth and a teacher's probabilities, and the distance to the teacher's features.

    The teacher is asked at every step, about the very picture that the network is given: a consistent teacher (Beyer et
    al. 2022, "Knowledge distillation: A good teacher is patient and consistent", arXiv:2106.05237). Of what the labels
    do not know, two photos mixed into one (``augment.mix``), its probabilities are all of the target. Its features are
    hints (Romero et al. 2015, "FitNets", arXiv:1412.6550, eq. 3): 1x1 convolutions lead from the network's to them, and
    are thrown away after training. They are those of the three coarsest blocks (the last before the bottom, the bottom,
    the first after it), which know what a thing is, not where it ends; brought to the size of the network's, and of
    mean 0 and deviation 1 over the batch of all processes in every channel, so that none counts more than another.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, network: AttentionUNet, teacher: AttentionUNet, device: torch.device
    ) -> None:
        """The objective of a run.

        Args:
            config: Of the run.
            ranks: Which of its processes this is.
            network: What is trained, on its device.
            teacher: Any network with these blocks. It comes to the device, and is never changed.
            device: Of the run.
        """
        super().__init__(config, ranks)
        self.teacher = teacher.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        image = torch.zeros(1, 3, config.data.height, config.data.width, device=device)
        widths = zip(_widths(network, image), _widths(teacher, image), strict=True)
        hints = nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for inputs, outputs in widths)
        self.hints = hints.to(device).to(memory_format=torch.channels_last)

    def student(self, network: AttentionUNet) -> nn.Module:
        """The network with its hints."""
        return _Hinted(network, self.hints)

    def __call__(self, forward: Callable[[Tensor], Any], image: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Objective.__call__`."""
        with torch.no_grad():
            said, blocks = _coarsest(self.teacher, image)
        logits, hinted = forward(image)
        share = torch.where(labels == UNKNOWN, 1.0, self.loss.teacher).unsqueeze(1)
        target = target_of(labels, self.border_target).lerp(torch.sigmoid(said.float()), share)
        loss = self._against(target, logits)
        apart = [
            F.mse_loss(own.float(), self._standard(F.adaptive_avg_pool2d(block.float(), own.shape[-2:])))
            for own, block in zip(hinted, blocks, strict=True)
        ]
        return loss + self.loss.features * torch.stack(apart).mean()

    def _standard(self, block: Tensor) -> Tensor:
        """A block's features [N, C, H, W] with mean 0 and deviation 1 in every channel of the whole batch."""
        count = self.ranks.size * block.numel() // block.shape[1]
        mean = self.ranks.sum(block.sum((0, 2, 3), keepdim=True)) / count
        centred = block - mean
        variance = self.ranks.sum(centred.square().sum((0, 2, 3), keepdim=True)) / count
        return centred * torch.rsqrt(variance + 1e-5)  # a channel that says nothing stays at 0


class _Hinted(nn.Module):
    """A network, and the way from its features to its teacher's."""

    def __init__(self, network: AttentionUNet, hints: nn.ModuleList) -> None:
        super().__init__()
        self.network, self.hints = network, hints

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, 1, H, W], and what the hints make of the coarsest blocks."""
        logits, blocks = _coarsest(self.network, image)
        return logits, [hint(block) for hint, block in zip(self.hints, blocks, strict=True)]


def _coarsest(network: AttentionUNet, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the features of the last block before the bottom, of the bottom, and of the first block after it."""
    logits, blocks = network.with_features(image)
    last = len(network.config.channels) - 1
    return logits, [blocks[name] for name in (f"down{last}", "bottom", f"up{last}")]


def _widths(network: AttentionUNet, image: Tensor) -> list[int]:
    """The channels of those blocks; the network is left as it was."""
    training = network.training
    with torch.no_grad():
        _, blocks = _coarsest(network.eval(), image)
    network.train(training)
    return [block.shape[1] for block in blocks]
