"""What the network is taught to minimise: binary cross-entropy, Dice, and their weighted sum.

At soft targets the soft Dice loss is not least (see :func:`dice_loss`); the semimetric one is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DICE_LOSSES", "bce_dice", "dice_loss", "semimetric_dice_loss"]

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
    the network soft there is the cross-entropy beside it. :func:`semimetric_dice_loss` is least at p = g. (The models
    of this project were trained with the one here.)

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


def semimetric_dice_loss(logits: Tensor, target: Tensor, epsilon: float = 1.0, total: Total = _here) -> Tensor:
    """``1 - (sum(p) + sum(g) - sum(|p - g|) + epsilon) / (sum(p) + sum(g) + epsilon)``, the sums over the whole batch.

    For hard targets it is :func:`dice_loss`, whose ``2 sum(p g)`` is then this numerator; for soft ones it is 0 at
    p = g and above everywhere else. (Wang et al. 2023, "Dice Semimetric Losses: Optimizing the Dice Score with Soft
    Labels", arXiv:2303.16296: the first of their two, here with an epsilon.) We have not trained with it yet.

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1].
        epsilon: Keeps an all-empty batch defined (loss 0 there).
        total: See :func:`dice_loss`.

    Returns:
        A float32 scalar in [0, 1].
    """
    p = torch.sigmoid(logits.float())
    g = target.float()
    apart, predicted, true = total(torch.stack(((p - g).abs().sum(), p.sum(), g.sum()))).unbind()
    return 1 - (predicted + true - apart + epsilon) / (predicted + true + epsilon)


#: A Dice loss: logits, target, epsilon and total, as those above.
DiceLoss: TypeAlias = Callable[[Tensor, Tensor, float, Total], Tensor]

#: The Dice losses by the names that the setting ``loss.dice_form`` has for them.
DICE_LOSSES: Final[dict[str, DiceLoss]] = {"soft": dice_loss, "semimetric": semimetric_dice_loss}


def bce_dice(
    logits: Tensor,
    target: Tensor,
    bce: float = 0.5,
    dice: float = 0.5,
    epsilon: float = 1.0,
    total: Total = _here,
    dice_form: DiceLoss = dice_loss,
) -> Tensor:
    """``bce * BCE + dice * L_Dice``; the published network's loss at 0.5 and 0.5.

    BCE is taken from the logits in float32 (log-sum-exp), so that a confident mistake stays finite.

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1]; between them cross-entropy and soft Dice pull apart, see :func:`dice_loss`.
        bce: Weight of the cross-entropy, averaged over pixels.
        dice: Weight of the Dice loss.
        epsilon: See :func:`dice_loss`.
        total: See :func:`dice_loss`. The cross-entropy is of this process's part alone: the mean over equal parts,
            which the averaging of the gradients takes, is that of the whole batch.
        dice_form: Which Dice loss it is; one of :data:`DICE_LOSSES`.

    Returns:
        A float32 scalar.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float())
    return bce * cross_entropy + dice * dice_form(logits, target, epsilon, total)
