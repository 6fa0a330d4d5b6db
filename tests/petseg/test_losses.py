from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from petseg.losses import DICE_LOSSES, bce_dice, dice_loss, semimetric_dice_loss

SHAPE = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6).map(lambda hw: (2, 1, *hw))
PAIRS = SHAPE.flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)),
        hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    )
)


def plain_dice(z: np.ndarray, g: np.ndarray, epsilon: float) -> float:
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    g = g.astype(np.float64)
    return float(1 - (2 * (p * g).sum() + epsilon) / (p.sum() + g.sum() + epsilon))


def plain_bce(z: np.ndarray, g: np.ndarray) -> float:
    z, g = z.astype(np.float64), g.astype(np.float64)
    return float(np.mean(g * np.log1p(np.exp(-z)) + (1 - g) * np.log1p(np.exp(z))))


@given(PAIRS, st.sampled_from([1e-3, 1.0, 10.0]))
def test_dice_is_the_plain_formula(pair: tuple[np.ndarray, np.ndarray], epsilon: float) -> None:
    z, g = pair
    loss = dice_loss(torch.from_numpy(z), torch.from_numpy(g), epsilon)
    assert loss.item() == pytest.approx(plain_dice(z, g, epsilon), abs=2e-5)
    assert -1e-6 <= loss.item() <= 1 + 1e-6
    assert loss.shape == ()
    assert loss.dtype == torch.float32


@given(PAIRS, st.floats(0, 2), st.floats(0, 2))
def test_bce_dice_is_the_weighted_sum(pair: tuple[np.ndarray, np.ndarray], bce: float, dice: float) -> None:
    z, g = pair
    loss = bce_dice(torch.from_numpy(z), torch.from_numpy(g), bce, dice)
    assert loss.item() == pytest.approx(bce * plain_bce(z, g) + dice * plain_dice(z, g, 1.0), rel=1e-4, abs=5e-5)


def test_the_published_weights_are_the_default() -> None:
    z, g = torch.randn(2, 1, 4, 4), (torch.rand(2, 1, 4, 4) > 0.5).float()
    expected = 0.5 * plain_bce(z.numpy(), g.numpy()) + 0.5 * plain_dice(z.numpy(), g.numpy(), 1.0)
    assert bce_dice(z, g).item() == pytest.approx(expected, abs=1e-5)


def test_one_weight_alone() -> None:
    z, g = torch.randn(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.3).float()
    assert bce_dice(z, g, 1.0, 0.0).item() == pytest.approx(plain_bce(z.numpy(), g.numpy()), abs=1e-5)
    assert bce_dice(z, g, 0.0, 1.0).item() == pytest.approx(plain_dice(z.numpy(), g.numpy(), 1.0), abs=1e-5)
    assert bce_dice(z, g, 0.0, 1.0, 7.0).item() == pytest.approx(plain_dice(z.numpy(), g.numpy(), 7.0), abs=1e-5)


def test_dice_sums_over_the_whole_batch_not_over_each_photo() -> None:
    """Photo 0 has no pet and a perfect prediction, photo 1 is half right: averaged per photo, it would be 0.25."""
    z = torch.full((2, 1, 10, 100), -100.0)
    g = torch.zeros(2, 1, 10, 100)
    g[1] = 1
    z[1, :, :5] = 100.0
    assert dice_loss(z, g).item() == pytest.approx(1 - (2 * 500 + 1) / (500 + 1000 + 1), abs=1e-5)


def test_perfect_is_0_and_opposite_is_1() -> None:
    g = torch.zeros(1, 1, 64, 64)
    g[..., :32] = 1
    assert dice_loss(200 * g - 100, g).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(100 - 200 * g, g).item() == pytest.approx(1, abs=1e-3)


def test_a_batch_without_any_pet() -> None:
    g = torch.zeros(2, 1, 8, 8)
    assert dice_loss(torch.full((2, 1, 8, 8), -1e4), g).item() == 0
    assert dice_loss(torch.zeros(2, 1, 8, 8), g).item() == pytest.approx(1 - 1 / 65)
    assert bce_dice(torch.full((2, 1, 8, 8), -1e4), g).item() == 0


def test_soft_targets_are_met_at_their_own_probability() -> None:
    """Cross-entropy against a border of 0.3 is smallest at p = 0.3."""
    g = torch.full((1, 1, 4, 4), 0.3)
    z = torch.full((1, 1, 4, 4), float(np.log(0.3 / 0.7)), requires_grad=True)
    loss = bce_dice(z, g, 1.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.3 * np.log(0.3) + 0.7 * np.log(0.7)), abs=1e-6)
    assert z.grad.abs().max() < 1e-7


@pytest.mark.parametrize("form", DICE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(dtype: torch.dtype, size: float, form: str) -> None:
    z = torch.full((2, 1, 8, 8), size, dtype=dtype, requires_grad=True)
    g = (torch.arange(128).reshape(2, 1, 8, 8) % 2).float()
    loss = bce_dice(z, g, dice_form=DICE_LOSSES[form])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * abs(z[0, 0, 0, 0].item()) / 2, rel=1e-3)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_million_half_precision_pixels_do_not_overflow_the_sums(dtype: torch.dtype) -> None:
    z = torch.full((1, 1, 1024, 1024), 2.0, dtype=dtype)
    g = torch.ones(1, 1, 1024, 1024, dtype=dtype)
    p = 1 / (1 + np.exp(-2.0))
    assert dice_loss(z, g).item() == pytest.approx(1 - 2 * p / (p + 1), abs=1e-4)
    assert bce_dice(z, g, 1.0, 0.0).item() == pytest.approx(np.log1p(np.exp(-2.0)), abs=1e-4)


@pytest.mark.parametrize(("bce", "dice"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_the_gradient_lifts_pet_and_lowers_background(bce: float, dice: float) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 1, 8, 8, requires_grad=True)
    g = (torch.rand(2, 1, 8, 8) > 0.6).float()
    loss = bce_dice(z, g, bce, dice)
    loss.backward()
    assert (z.grad[g == 1] < 0).all()
    assert (z.grad[g == 0] > 0).all()
    assert bce_dice(z.detach() - z.grad, g, bce, dice) < loss


@given(PAIRS)
def test_the_gradient_is_that_of_the_plain_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    z = torch.from_numpy(pair[0]).requires_grad_()
    bce_dice(z, torch.from_numpy(pair[1]), 0.7, 0.3, 2.0).backward()
    p = 1 / (1 + np.exp(-pair[0].astype(np.float64)))
    g = pair[1].astype(np.float64)
    over, under = 2 * (p * g).sum() + 2.0, p.sum() + g.sum() + 2.0
    expected = 0.7 * (p - g) / p.size + 0.3 * (over - 2 * g * under) / under**2 * p * (1 - p)
    np.testing.assert_allclose(z.grad.numpy(), expected, atol=1e-5)


@given(PAIRS, st.sampled_from([1e-3, 1.0, 10.0]))
def test_semimetric_dice_is_the_plain_formula_and_soft_dice_on_hard_targets(
    pair: tuple[np.ndarray, np.ndarray], epsilon: float
) -> None:
    z, g = pair
    p, t = 1 / (1 + np.exp(-z.astype(np.float64))), g.astype(np.float64)
    both = p.sum() + t.sum()
    loss = semimetric_dice_loss(torch.from_numpy(z), torch.from_numpy(g), epsilon)
    assert loss.item() == pytest.approx(1 - (both - abs(p - t).sum() + epsilon) / (both + epsilon), abs=2e-5)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    hard = np.round(g)
    loss = semimetric_dice_loss(torch.from_numpy(z), torch.from_numpy(hard), epsilon)
    assert loss.item() == pytest.approx(plain_dice(z, hard, epsilon), abs=2e-5)


def test_semimetric_dice_is_least_at_soft_targets_and_soft_dice_is_not() -> None:
    g = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.2]).reshape(1, 1, 2, 3)
    z = torch.logit(g)
    p = torch.sigmoid(z)  # the targets, to the last bit
    gradients = {}
    for form, loss in DICE_LOSSES.items():
        there = z.clone().requires_grad_()
        loss(there, p, 1.0, lambda part: part).backward()
        assert there.grad is not None
        gradients[form] = there.grad
    assert torch.equal(gradients["semimetric"], torch.zeros_like(z))
    assert gradients["soft"].abs().min() > 1e-3
    assert semimetric_dice_loss(z, p).item() == 0
    for pixel in range(z.numel()):
        for step in (-0.1, 0.1):
            moved = z.flatten().clone()
            moved[pixel] += step
            away = moved.reshape(z.shape).requires_grad_()
            value = semimetric_dice_loss(away, p)
            value.backward()
            assert value.item() > 1e-4
            assert away.grad is not None
            assert away.grad.flatten()[pixel] * step > 0, "back to its target"


def test_the_form_of_the_dice_loss_is_that_of_the_sum() -> None:
    z, g = torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    both = bce_dice(z, g, 0.3, 0.7, 2.0, dice_form=semimetric_dice_loss).item()
    assert both == pytest.approx(0.3 * plain_bce(z.numpy(), g.numpy()) + 0.7 * semimetric_dice_loss(z, g, 2.0).item())
    assert bce_dice(z, g, 0.0, 1.0).item() == dice_loss(z, g).item(), "as published, unless said otherwise"


def test_the_dice_loss_makes_soft_targets_hard_as_its_docstring_says() -> None:
    """300 pixels of pet, 580 of background, and 120 of border with target 0.2."""
    truth = torch.cat((torch.ones(300), torch.full((120,), 0.2), torch.zeros(580)))

    def loss(border: float) -> float:
        p = torch.where(truth == 0.2, border, truth)
        return dice_loss(torch.logit(p, 1e-6)[None, None, None], truth[None, None, None]).item()

    assert loss(0.0) == pytest.approx(0.0384, abs=1e-4)
    assert loss(0.2) == pytest.approx(0.0592, abs=1e-4)
    # The gradient with respect to each p is (D - 2 g) / S: it changes its sign at half of D, whatever g is.
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.linspace(0, 1, 1000)
    both, total = (p * targets).sum(), p.sum() + targets.sum()
    value = 1 - (2 * both + 1) / (total + 1)
    value.backward()
    coefficient = 1 - value.item()
    expected = (coefficient - 2 * targets) / (total.item() + 1)
    assert p.grad is not None
    torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-8)
    z = torch.logit(p.detach())[None, None, None].requires_grad_()
    dice_loss(z, targets[None, None, None]).backward()
    assert z.grad is not None
    sure = (targets - coefficient / 2).abs() > 1e-3
    assert torch.equal(z.grad.flatten()[sure] < 0, targets[sure] > coefficient / 2)
