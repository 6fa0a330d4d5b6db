"""The deployed network against normalisation, network and sigmoid done by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg_export.deploy import DeployedUNet, fold_batchnorm


def random_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour fields with noise: inputs on which the output is not constant."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(-2, 2, (count * 3, 3))]  # each [H, W] in -1..1
    fields = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
    return np.clip(127 + 100 * fields + rng.normal(0, 20, fields.shape), 0, 255).astype(np.uint8)


def by_hand(image: np.ndarray) -> torch.Tensor:
    """ImageNet normalisation in float64, [N, H, W, 3] to [N, 3, H, W]."""
    scaled = (image.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def make(seed: int, width: int = 4) -> AttentionUNet:
    """Random weights, BatchNorms as after much training, and a head under which probabilities spread over 0..1."""
    torch.manual_seed(seed)
    model = AttentionUNet(AttentionUNetConfig(width=width)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    with torch.no_grad():
        logits = model(by_hand(random_images(4, 32, 32, seed)))
        scale = 2 / logits.std()
        model.head.weight.mul_(scale)
        model.head.bias.copy_((model.head.bias - logits.mean()) * scale)
    return model


def expected(model: AttentionUNet, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(by_hand(image))[:, 0].double().numpy()
    return np.rint(255 / (1 + np.exp(-logits))).astype(np.int64)


def deployed(model: AttentionUNet, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return DeployedUNet(model)(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_the_deployed_network_is_normalisation_network_and_sigmoid(seed: int, height: int, width: int) -> None:
    model, image = make(seed), random_images(3, height, width, seed)
    want, got = expected(model, image), deployed(model, image)
    assert len(np.unique(want)) > 50, "a flat output would prove nothing"
    assert np.abs(got - want).max() <= 1
    assert (got == want).mean() > 0.99, "rounded, not cut off: only ties may differ"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_output_is_one_byte_for_each_pixel_whatever_the_batch(count: int) -> None:
    got = deployed(make(0), random_images(count, 16, 32))
    assert got.dtype == np.uint8
    assert got.shape == (count, 16, 32)


def test_an_image_gets_the_same_answer_alone_and_in_a_batch() -> None:
    model, image = make(1), random_images(5, 32, 32)
    alone = np.concatenate([deployed(model, image[i : i + 1]) for i in range(5)])
    together = deployed(model, image)
    assert np.abs(alone.astype(int) - together).max() <= 1
    assert (np.abs(together[0].astype(int) - together[1]) > 1).any(), "the images themselves differ"


def test_the_extremes_of_probability_are_reached_and_do_not_wrap_around() -> None:
    model, image = make(2), random_images(1, 16, 16)
    nn.init.zeros_(model.head.weight)
    for bias, value in ((100.0, 255), (-100.0, 0)):
        nn.init.constant_(model.head.bias, bias)
        assert (deployed(model, image) == value).all()


def test_the_input_stays_as_it_was() -> None:
    image = random_images(2, 16, 16)
    before = image.copy()
    deployed(make(0), image)
    assert (image == before).all()


def test_no_batchnorm_is_left_after_folding() -> None:
    model = make(0)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in DeployedUNet(model).modules())


@pytest.mark.parametrize("seed", range(3))
def test_folding_changes_no_logit_by_more_than_rounding(seed: int) -> None:
    model = make(seed, width=6)
    x = by_hand(random_images(2, 32, 32, seed))
    with torch.no_grad():
        want, got = model(x), fold_batchnorm(model)(x)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_folding_leaves_the_original_alone() -> None:
    model = make(0).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    folded(by_hand(random_images(2, 16, 16)))
    assert model.training, "its mode too"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_in_training_mode_is_deployed_in_evaluation_mode() -> None:
    model, image = make(3), random_images(2, 32, 32)
    want = expected(model, image)
    got = deployed(model.train(), image)
    assert np.abs(got - want).max() <= 1
    assert not DeployedUNet(model).training


def test_a_size_that_the_network_cannot_halve_four_times_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        deployed(make(0), random_images(1, 24, 32))
