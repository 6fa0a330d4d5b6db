from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from petseg.model import AttentionGate, AttentionUNet, AttentionUNetConfig, ConvBlock, Up, normalize


def small(seed: int = 0, width: int = 4) -> AttentionUNet:
    torch.manual_seed(seed)
    return AttentionUNet(AttentionUNetConfig(width=width))


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """BatchNorm statistics and factors that are not the identity, so that leaving one out is noticed."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.2, generator=generator)
    return module


@pytest.mark.parametrize(("width", "parameters"), [(64, 29_300_205), (16, 1_834_629)])
def test_parameter_count(width: int, parameters: int) -> None:
    with torch.device("meta"):
        model = AttentionUNet(AttentionUNetConfig(width=width))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_default_is_the_published_network() -> None:
    assert AttentionUNetConfig().channels == (64, 128, 256, 512, 1024)
    with torch.device("meta"):
        assert AttentionUNet().config == AttentionUNetConfig(width=64)


def test_names_of_tensors_stay_what_checkpoints_hold() -> None:
    names = small().state_dict().keys()
    assert {"down1.0.weight", "down4.4.running_var", "bottom.3.weight", "up4.project.bias"} <= names
    assert {"up1.gate.w_g.0.weight", "up1.gate.w_x.1.bias", "up1.gate.psi.0.bias", "up1.block.0.weight"} <= names
    assert {"head.weight", "head.bias"} <= names
    assert {name.split(".")[0] for name in names} == {
        *("down1", "down2", "down3", "down4", "bottom", "up4", "up3", "up2", "up1", "head")
    }


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 32, 48), (3, 48, 32), (5, 16, 64)])
def test_output_has_the_size_of_the_input(shape: tuple[int, int, int]) -> None:
    n, h, w = shape
    with torch.inference_mode():
        logits = small(width=2).eval()(torch.randn(n, 3, h, w))
    assert logits.shape == (n, 1, h, w)
    assert logits.dtype == torch.float32


def test_output_is_logits_not_probabilities() -> None:
    model = small().eval()
    with torch.inference_mode():
        model.head.bias.fill_(-5.0)
        assert model(torch.zeros(1, 3, 16, 16)).max() < 0
        model.head.bias.fill_(5.0)
        assert model(torch.zeros(1, 3, 16, 16)).min() > 1


@pytest.mark.parametrize(("h", "w"), [(17, 32), (32, 40), (8, 24), (31, 33)])
def test_a_size_not_divisible_by_16_is_refused_with_both_numbers(h: int, w: int) -> None:
    with pytest.raises(ValueError, match=rf"\b{h} x {w}\b.*\b16\b"):
        small(width=2)(torch.zeros(1, 3, h, w))


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 16"):
        small(width=2)(torch.zeros(1, 3, 0, 16))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 16, 16, 3)])
def test_wrong_channels_or_dimensions_are_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=", ".join(map(str, shape))):
        small(width=2)(torch.zeros(shape))


@pytest.mark.parametrize("width", [-2, 0, 1, 3, 63])
def test_an_odd_or_not_positive_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}"):
        AttentionUNetConfig(width=width)


def test_the_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionUNetConfig().width = 16  # type: ignore[misc]


def test_conv_block_is_conv_norm_relu_twice() -> None:
    torch.manual_seed(0)
    block = lively(ConvBlock(3, 6)).eval()
    x = torch.randn(2, 3, 8, 10)
    y = x
    for conv, norm in ((block[0], block[1]), (block[3], block[4])):
        y = F.conv2d(y, conv.weight, None, padding=1)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).clamp(min=0)
    torch.testing.assert_close(block(x), y)
    assert block[0].bias is None
    assert block[3].bias is None


def test_projecting_before_interpolating_is_interpolating_before_projecting() -> None:
    torch.manual_seed(0)
    up = lively(Up(8, 4)).eval().double()
    deep, skip = torch.randn(2, 8, 5, 3).double(), torch.randn(2, 4, 10, 6).double()
    with torch.inference_mode():
        wide = up.project(F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False))
        expected = up.block(torch.cat((up.gate(wide, skip), wide), dim=1))
        torch.testing.assert_close(up(deep, skip), expected, rtol=1e-10, atol=1e-12)


def test_attention_gate_is_the_published_formula() -> None:
    torch.manual_seed(0)
    gate = lively(AttentionGate(6)).eval().double()
    g, x = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 4, 5).double()

    def linear(part: torch.nn.Sequential, value: torch.Tensor) -> torch.Tensor:
        conv, norm = part
        out = torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], value) + conv.bias[:, None, None]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return (out - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    inside = torch.relu(linear(gate.w_g, g) + linear(gate.w_x, x))
    alpha = 1 / (1 + torch.exp(-linear(gate.psi, inside)))
    assert alpha.shape == (2, 1, 4, 5)
    torch.testing.assert_close(gate(g, x), alpha * x)


def test_attention_is_one_value_between_0_and_1_for_each_pixel() -> None:
    torch.manual_seed(0)
    gate = AttentionGate(8).train()
    with torch.no_grad():
        alpha = gate(3 * torch.randn(2, 8, 6, 6), torch.ones(2, 8, 6, 6))
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert alpha.std() > 0.05, "the gate tells no pixel from another"
    assert torch.equal(alpha, alpha[:, :1].expand_as(alpha))


@pytest.mark.parametrize(("bias", "share"), [(-30.0, 0.0), (30.0, 1.0)])
def test_a_gate_can_close_and_open(bias: float, share: float) -> None:
    torch.manual_seed(0)
    gate = AttentionGate(4).eval()
    g, x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        gate.psi[1].bias.fill_(bias)
        torch.testing.assert_close(gate(g, x), share * x, atol=1e-6, rtol=0)


def test_closed_gates_cut_the_skips_out_of_the_network() -> None:
    """With every gate shut, only the deepest level is left: the output no longer sees the first level's weights."""
    model = small().eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        for up in (model.up4, model.up3, model.up2, model.up1):
            up.gate.psi[1].bias.fill_(-200.0)
            up.project.weight.zero_()
        shut = model(x)
        assert torch.equal(shut, model(torch.randn(1, 3, 32, 32)))
        model.up1.gate.psi[1].bias.fill_(0.0)
        assert not torch.equal(shut, model(x))


def test_gradients_reach_every_parameter() -> None:
    model = lively(small()).eval()  # in training BatchNorm cancels the biases before it
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(1, 3, 16, 16)
    before = x.clone()
    with torch.inference_mode():
        small().eval()(x)
    assert torch.equal(x, before)


def test_evaluation_is_deterministic_and_each_image_is_on_its_own() -> None:
    model = lively(small()).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        together = model(x)
        assert torch.equal(together, model(x))
        torch.testing.assert_close(together, torch.cat([model(one[None]) for one in x]), atol=1e-5, rtol=1e-5)
        model.train()
        assert not torch.allclose(model(x), model(x[:2]).repeat(2, 1, 1, 1)), "BatchNorm does not see the batch"


def test_normalize_by_hand() -> None:
    image = torch.tensor([[[[255, 0, 128], [0, 255, 64]]]], dtype=torch.uint8)  # [1, 1, 2, 3]
    out = normalize(image)
    assert out.shape == (1, 3, 1, 2)
    assert out.dtype == torch.float32
    expected = [
        [(1 - 0.485) / 0.229, (0 - 0.485) / 0.229],
        [(0 - 0.456) / 0.224, (1 - 0.456) / 0.224],
        [(128 / 255 - 0.406) / 0.225, (64 / 255 - 0.406) / 0.225],
    ]
    torch.testing.assert_close(out[0, :, 0], torch.tensor(expected))


def test_normalize_keeps_rows_and_columns_and_the_cheap_layout() -> None:
    image = torch.randint(0, 256, (2, 16, 32, 3), dtype=torch.uint8)
    out = normalize(image)
    assert out.shape == (2, 3, 16, 32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    bytes_back = (out.permute(0, 2, 3, 1) * std + mean) * 255
    assert torch.equal(bytes_back.round().to(torch.uint8), image)
