"""The deployed network, compared with separate normalisation, network and sigmoid; and the layers that fit float16."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from petseg.model import AttentionUNet
from petseg_export.deploy import HALF_LIMIT, DeployedUNet, TypedConv, activation_peaks, fold_batchnorm

Make = Callable[..., AttentionUNet]
Draw = Callable[..., np.ndarray]


@pytest.fixture
def make(random_network: Make) -> Make:
    return random_network


def by_hand(image: np.ndarray) -> torch.Tensor:
    """ImageNet normalisation in float64, [N, H, W, 3] to [N, 3, H, W]."""
    scaled = (image.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def expected(model: AttentionUNet, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(by_hand(image))[:, 0].double().numpy()
    return np.rint(255 / (1 + np.exp(-logits))).astype(np.int64)


def deployed(model: AttentionUNet, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return DeployedUNet(model)(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_the_deployed_network_includes_normalisation_and_sigmoid(
    seed: int, height: int, width: int, make: Make, random_images: Draw
) -> None:
    model, image = make(seed), random_images(3, height, width, seed)
    want, got = expected(model, image), deployed(model, image)
    assert len(np.unique(want)) > 50, "a constant output would prove nothing"
    assert np.abs(got - want).max() <= 1
    assert (got == want).mean() > 0.99, "rounded, not truncated: only ties may differ"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_output_is_one_byte_per_pixel_for_any_batch(count: int, make: Make, random_images: Draw) -> None:
    got = deployed(make(0), random_images(count, 16, 32))
    assert got.dtype == np.uint8
    assert got.shape == (count, 16, 32)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (48, 16)])
def test_the_edge_network_is_deployed_correctly(height: int, width: int, make: Make, random_images: Draw) -> None:
    model = make(0, stem="strided", ungated=(1,), decoder_convs=1)
    image = random_images(3, height, width, 0)
    want, got = expected(model, image), deployed(model, image)
    assert len(np.unique(want)) > 50, "a constant output would prove nothing"
    assert np.abs(got - want).max() <= 1
    assert (got == want).mean() > 0.99


def test_an_image_gives_the_same_output_alone_and_in_a_batch(make: Make, random_images: Draw) -> None:
    model, image = make(1), random_images(5, 32, 32)
    alone = np.concatenate([deployed(model, image[i : i + 1]) for i in range(5)])
    together = deployed(model, image)
    assert np.abs(alone.astype(int) - together).max() <= 1
    assert (np.abs(together[0].astype(int) - together[1]) > 1).any(), "the images themselves differ"


def test_probabilities_reach_0_and_255_without_wrapping(make: Make, random_images: Draw) -> None:
    model, image = make(2), random_images(1, 16, 16)
    nn.init.zeros_(model.head.weight)
    for bias, value in ((100.0, 255), (-100.0, 0)):
        nn.init.constant_(model.head.bias, bias)
        assert (deployed(model, image) == value).all()


def test_the_input_is_not_modified(make: Make, random_images: Draw) -> None:
    image = random_images(2, 16, 16)
    before = image.copy()
    deployed(make(0), image)
    assert (image == before).all()


def test_no_batchnorm_is_left_after_folding(make: Make) -> None:
    model = make(0)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in DeployedUNet(model).modules())


@pytest.mark.parametrize("seed", range(3))
def test_folding_changes_no_logit_by_more_than_rounding(seed: int, make: Make, random_images: Draw) -> None:
    model = make(seed, width=6)
    x = by_hand(random_images(2, 32, 32, seed))
    with torch.no_grad():
        want, got = model(x), fold_batchnorm(model)(x)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_folding_does_not_modify_the_original(make: Make, random_images: Draw) -> None:
    model = make(0).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    folded(by_hand(random_images(2, 16, 16)))
    assert model.training, "the training mode is unchanged, too"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_in_training_mode_is_deployed_in_evaluation_mode(make: Make, random_images: Draw) -> None:
    model, image = make(3), random_images(2, 32, 32)
    want = expected(model, image)
    got = deployed(model.train(), image)
    assert np.abs(got - want).max() <= 1
    assert not DeployedUNet(model).training


def test_a_size_not_divisible_by_16_is_rejected(make: Make, random_images: Draw) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        deployed(make(0), random_images(1, 24, 32))


# ------------------------------------------------------------------------------------------------ float16


def test_peaks_match_those_seen_by_forward_hooks(make: Make, random_images: Draw) -> None:
    """Computed separately for three layers, in which the input, the bias and the output are the largest."""
    model, image = make(4), random_images(3, 32, 32)
    peaks = activation_peaks(model, image)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(peaks) == convolutions
    folded, x, largest = fold_batchnorm(model), by_hand(image), []
    for name in ("down1", "down2", "down3"):
        block = getattr(folded, name)
        with torch.no_grad():
            seen = [float(tensor.abs().max()) for tensor in (x, block[0].weight, block[0].bias, block[0](x))]
            x = nn.functional.max_pool2d(block(x), 2)
        assert peaks[f"{name}.0"] == pytest.approx(max(seen), rel=1e-5)
        largest.append(seen.index(max(seen)))
    assert largest == [0, 2, 3]
    alone = [activation_peaks(model, image[i : i + 1]) for i in range(3)]
    assert peaks == {name: pytest.approx(max(each[name] for each in alone)) for name in convolutions}


def test_negative_values_count_by_their_size(make: Make) -> None:
    model, black = make(4), np.zeros((1, 32, 32, 3), np.uint8)
    nn.init.constant_(model.head.weight, -1)
    nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        for tensor in model.up1.block[4].parameters():
            tensor.mul_(10)  # so that the logits exceed the weights
        logits = model(by_hand(black))
    peaks = activation_peaks(model, black)
    assert peaks["head"] == pytest.approx(float(-logits.min()), rel=1e-5)
    assert peaks["down1.0"] == pytest.approx(float(-by_hand(black).min()), rel=1e-5)


def test_without_photos_the_peaks_are_those_of_the_weights(make: Make) -> None:
    model = make(4)
    folded = fold_batchnorm(model)
    peaks = activation_peaks(model, [])
    assert peaks["head"] == max(float(p.detach().abs().max()) for p in folded.head.parameters())


def test_scanning_for_peaks_does_not_modify_the_network(make: Make, random_images: Draw) -> None:
    model = make(4).train()
    before = copy.deepcopy(model.state_dict())
    activation_peaks(model, random_images(1, 16, 16))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_chosen_layers_are_float16_and_everything_else_float32(make: Make, random_images: Draw) -> None:
    model, image = make(5), random_images(2, 32, 32)
    names = list(activation_peaks(model, []))
    half = set(names) - {"down1.0", "up2.project", "up2.gate.psi.0"}
    network = DeployedUNet(model, half)
    found = {n: m.conv.weight.dtype for n, m in network.network.named_modules() if isinstance(m, TypedConv)}
    assert found == {name: torch.float16 if name in half else torch.float32 for name in names}
    assert network.scale.dtype == network.offset.dtype == torch.float32
    with torch.no_grad():
        got = network(torch.from_numpy(image)).numpy()
    want = expected(model, image)
    assert len(np.unique(want)) > 50
    assert np.percentile(np.abs(got - want), 99) <= 4
    assert np.abs(got - want).max() > 0, "float16 does round"


def test_without_chosen_layers_the_network_is_float32(make: Make) -> None:
    network = DeployedUNet(make(5))
    assert not any(isinstance(module, TypedConv) for module in network.modules())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_limit_leaves_a_margin_for_unseen_activations() -> None:
    assert torch.finfo(torch.float16).max / 16 < HALF_LIMIT < torch.finfo(torch.float16).max / 4
