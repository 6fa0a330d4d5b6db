"""The losses: binary cross-entropy, Dice, and their weighted sum.

The minimum of the soft Dice loss is not at soft targets (see :func:`dice_loss`); that of the semimetric one is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DICE_LOSSES", "bce_dice", "dice_loss", "semimetric_dice_loss"]

#: Differentiable sum of a tensor over the parts of a batch on all ranks (an all-reduce).
Total: TypeAlias = Callable[[Tensor], Tensor]


def _here(part: Tensor) -> Tensor:
    """The sum for a batch on a single rank."""
    return part


def dice_loss(logits: Tensor, target: Tensor, epsilon: float = 1.0, total: Total = _here) -> Tensor:
    """``1 - (2 sum(p g) + epsilon) / (sum(p) + sum(g) + epsilon)``, the sums over the whole batch.

    Computed in float32 for any logits dtype: a batch has millions of pixels, and the largest float16 is 65504.
    (Milletari et al. 2016, "V-Net", arXiv:1606.04797, in the form with plain sums.)

    Soft targets are accepted, but this loss does not have its minimum at them. Its gradient with respect to one pixel's
    p is ``(D - 2 g) / S``, where D is the Dice coefficient and S the denominator above: p is pushed to 1 wherever g is
    above D / 2, to 0 wherever it is below, and never to g. So it hardens soft border targets and a teacher's
    probabilities; only the cross-entropy beside it keeps the network soft there. :func:`semimetric_dice_loss` has its
    minimum at p = g. (The models of this project were trained with the loss here.)

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1]; see above for soft targets.
        epsilon: Keeps an all-empty batch defined (loss 0 there).
        total: Sums over the ranks that a batch is split over; the loss is then that of the whole batch.

    Returns:
        A float32 scalar in [0, 1].
    """
    p = torch.sigmoid(logits.float())
    g = target.float()
    both, predicted, true = total(torch.stack(((p * g).sum(), p.sum(), g.sum()))).unbind()
    return 1 - (2 * both + epsilon) / (predicted + true + epsilon)


def semimetric_dice_loss(logits: Tensor, target: Tensor, epsilon: float = 1.0, total: Total = _here) -> Tensor:
    """``1 - (sum(p) + sum(g) - sum(|p - g|) + epsilon) / (sum(p) + sum(g) + epsilon)``, the sums over the whole batch.

    For hard targets it equals :func:`dice_loss`, whose ``2 sum(p g)`` is then this numerator; for soft ones it is 0 at
    p = g and greater everywhere else. (Wang et al. 2023, "Dice Semimetric Losses: Optimizing the Dice Score with Soft
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


#: A Dice loss: a function of logits, target, epsilon and total, like those above.
DiceLoss: TypeAlias = Callable[[Tensor, Tensor, float, Total], Tensor]

#: The Dice losses by the values of the setting ``loss.dice_form``.
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

    BCE is computed from the logits in float32 (log-sum-exp), so that a confident mistake stays finite.

    Args:
        logits: [N, 1, H, W], any float type.
        target: [N, 1, H, W] in [0, 1]; for soft targets cross-entropy and soft Dice disagree, see :func:`dice_loss`.
        bce: Weight of the cross-entropy, averaged over pixels.
        dice: Weight of the Dice loss.
        epsilon: See :func:`dice_loss`.
        total: See :func:`dice_loss`. The cross-entropy covers only this rank's part: the parts are equal, so averaging
            the gradients over the ranks makes it that of the whole batch.
        dice_form: The Dice loss, one of :data:`DICE_LOSSES`.

    Returns:
        A float32 scalar.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float())
    return bce * cross_entropy + dice * dice_form(logits, target, epsilon, total)
