"""What the network is taught to minimise: binary cross-entropy, Dice, and their weighted sum.

The Dice loss is not a proper loss for soft targets: see :func:`dice_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bce_dice", "dice_loss"]

#: Sums a tensor over the parts of a batch that other processes have, differentiably.
Total: TypeAlias = Callable[[Tensor], Tensor]


def _here(part: Tensor) -> Tensor:
    """Of a batch that is whole."""
    return part


def dice_loss(logits: Tensor, target: Tensor, epsilon: float = 1.0, total: Total = _here) -> Tensor:
    """``1 - (2 sum(p g) + epsilon) / (sum(p) + sum(g) + epsilon)``, the sums over the whole batch.

    Computed in float32 whatever the logits' type: a batch has millions of pixels, and float16 ends at 65504.
    (Milletari et al. 2016, "V-Net", arXiv:1606.04797, in the form with plain sums.)

    A soft target is taken, but is not what this loss is least at. Its gradient by one pixel's p is ``(D - 2 g) / S``,
    where D is the Dice coefficient and S the denominator above: p is pushed to 1 wherever g is above D / 2, to 0
    wherever it is below, and never to g. So it makes soft border targets and a teacher's probabilities hard; what keeps
    the network soft there is the cross-entropy beside it. (Wang et al. 2023, "Dice Semimetric Losses: Optimizing the
    Dice Score with Soft Labels", arXiv:2303.16296, give losses that are this one for hard targets, and least at p = g
    for soft ones. The models of this project were trained with the one here.)

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1]; see above for those in between.
        epsilon: Keeps an all-empty batch defined (loss 0 there).
        total: Where a batch is split over processes, their sum; the loss is that of the whole batch then.

    Returns:
        A float32 scalar in [0, 1].
    """
    p = torch.sigmoid(logits.float())
    g = target.float()
    both, predicted, true = total(torch.stack(((p * g).sum(), p.sum(), g.sum()))).unbind()
    return 1 - (2 * both + epsilon) / (predicted + true + epsilon)


def bce_dice(
    logits: Tensor,
    target: Tensor,
    bce: float = 0.5,
    dice: float = 0.5,
    epsilon: float = 1.0,
    total: Total = _here,
) -> Tensor:
    """``bce * BCE + dice * L_Dice``; the published network's loss at 0.5 and 0.5.

    BCE is taken from the logits in float32 (log-sum-exp), so that a confident mistake stays finite.

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1]; between them the two losses pull apart, see :func:`dice_loss`.
        bce: Weight of the cross-entropy, averaged over pixels.
        dice: Weight of the Dice loss.
        epsilon: See :func:`dice_loss`.
        total: See :func:`dice_loss`. The cross-entropy is of this process's part alone: the mean over equal parts,
            which the averaging of the gradients takes, is that of the whole batch.

    Returns:
        A float32 scalar.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float())
    return bce * cross_entropy + dice * dice_loss(logits, target, epsilon, total)
