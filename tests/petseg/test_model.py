from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from petseg import model as model_module
from petseg.model import AttentionGate, AttentionUNet, AttentionUNetConfig, ConvBlock, Up, normalize


def small(seed: int = 0, width: int = 4, **config: Any) -> AttentionUNet:
    torch.manual_seed(seed)
    return AttentionUNet(AttentionUNetConfig(width=width, **config))


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Set BatchNorm statistics and weights that are not the identity, so that omitting one is noticed."""
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


def test_the_published_count_has_the_biases_that_batch_norm_takes_off() -> None:
    with torch.device("meta"):
        model = AttentionUNet()
    dead = [p.numel() for n, p in model.named_parameters() if ".gate." in n and n.endswith(".0.bias")]
    assert (len(dead), sum(dead)) == (3 * 4, 964)
    assert sum(p.numel() for p in model.parameters()) - 964 == 29_299_241
    gate = lively(AttentionGate(8)).train()
    g, x = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    before = gate(g, x)
    with torch.no_grad():
        for part in (gate.w_g, gate.w_x, gate.psi):
            part[0].bias.add_(3.0)
    torch.testing.assert_close(gate(g, x), before, rtol=1e-4, atol=1e-4)


#: Other variants of the network, by the fields that they change.
VARIANTS: dict[str, dict[str, Any]] = {
    "strided": {"stem": "strided"},
    "strided, four levels": {"stem": "strided", "levels": (1, 2, 6, 12)},
    "six levels": {"levels": (1, 2, 3, 4, 5, 6)},
    "two levels": {"levels": (1, 2)},
    "wide above": {"levels": (3, 2, 2, 2, 1)},
    "some gates": {"ungated": (1, 3)},
    "no gates": {"ungated": (1, 2, 3, 4)},
    "short decoder": {"decoder_convs": 1},
    "all at once": {"stem": "strided", "levels": (1, 3, 2, 4, 5), "ungated": (2,), "decoder_convs": 1},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def test_the_edge_network_is_width_16_with_another_stem_and_head() -> None:
    with torch.device("meta"):
        edge = AttentionUNet(AttentionUNetConfig(width=16, stem="strided"))
        full = AttentionUNet(AttentionUNetConfig(width=16))
    assert sum(p.numel() for p in edge.parameters()) == 1_834_629 + 3 * (16 + 1)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (edge, full)]
    assert list(shapes[0]) == list(shapes[1])
    assert {name for name, shape in shapes[0].items() if shape != shapes[1][name]} == {"head.weight", "head.bias"}


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


def test_the_published_network_has_every_name_it_ever_had_in_the_same_order() -> None:
    def conv_bn(conv: str, bias: bool = False) -> list[str]:
        prefix, _, number = conv.rpartition(".")
        tensors = [f"{conv}.weight", *([f"{conv}.bias"] if bias else [])]
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [*tensors, *(f"{prefix}.{int(number) + 1}.{name}" for name in norm)]

    def up(name: str) -> list[str]:
        gate = [tensor for part in ("w_g", "w_x", "psi") for tensor in conv_bn(f"{name}.gate.{part}.0", bias=True)]
        block = [*conv_bn(f"{name}.block.0"), *conv_bn(f"{name}.block.3")]
        return [f"{name}.project.weight", f"{name}.project.bias", *gate, *block]

    blocks = [f"{name}.{n}" for name in ("down1", "down2", "down3", "down4", "bottom") for n in (0, 3)]
    encoder = [tensor for block in blocks for tensor in conv_bn(block)]
    decoder = [tensor for name in ("up4", "up3", "up2", "up1") for tensor in up(name)]
    assert list(small().state_dict()) == [*encoder, *decoder, "head.weight", "head.bias"]


@variants
@pytest.mark.parametrize("shape", [(2, 32, 48), (1, 80, 16), (1, 16, 16)])
def test_every_variant_keeps_the_size_of_the_input(variant: dict[str, Any], shape: tuple[int, int, int]) -> None:
    n, h, w = shape
    with torch.inference_mode():
        logits = small(width=2, **variant).eval()(torch.randn(n, 3, h, w))
    assert logits.shape == (n, 1, h, w)


@variants
def test_gradients_reach_every_parameter_of_every_variant(variant: dict[str, Any]) -> None:
    model = lively(small(width=8, **variant)).eval()  # in training BatchNorm cancels the biases before it
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@variants
def test_levels_have_the_channels_and_sizes_of_the_config(variant: dict[str, Any]) -> None:
    model = small(**variant).eval()
    seen: list[tuple[int, ...]] = []
    for name in [f"down{level}" for level in range(1, len(model.config.levels))] + ["bottom"]:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 48, 64))
    first = 2 if model.config.stem == "strided" else 1
    sizes = [first * 2**level for level in range(len(seen))]
    channels = [4 * multiple for multiple in model.config.levels]
    assert seen == [(c, math.ceil(48 / s), math.ceil(64 / s)) for c, s in zip(channels, sizes, strict=True)]


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
def test_a_size_not_divisible_by_16_is_rejected_with_both_numbers(h: int, w: int) -> None:
    with pytest.raises(ValueError, match=rf"\b{h} x {w}\b.*\b16\b"):
        small(width=2)(torch.zeros(1, 3, h, w))


def test_an_empty_image_is_rejected() -> None:
    with pytest.raises(ValueError, match="0 x 16"):
        small(width=2)(torch.zeros(1, 3, 0, 16))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16), (1, 16, 16, 3)])
def test_wrong_channels_or_dimensions_are_rejected_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=", ".join(map(str, shape))):
        small(width=2)(torch.zeros(shape))


@pytest.mark.parametrize("width", [-2, 0, 1, 3, 63])
def test_an_odd_or_not_positive_width_is_rejected(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}"):
        AttentionUNetConfig(width=width)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("levels", (1,), r"levels are \[1\]; there must be 2 or more"),
        ("levels", (), r"levels are \[\]"),
        ("levels", (1, 2, 0), r"levels are \[1, 2, 0\]"),
        ("stem", "patch", "stem is 'patch'; it must be 'full' or 'strided'"),
        ("ungated", (5,), "ungated names level 5; there are skips at levels 1 to 4"),
        ("ungated", (1, 0), "ungated names level 0"),
        ("decoder_convs", 0, "decoder_convs is 0; it must be 1 or 2"),
        ("decoder_convs", 3, "decoder_convs is 3"),
    ],
)
def test_an_invalid_value_is_rejected_by_name(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AttentionUNetConfig(**{field: value})


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


def test_an_ungated_skip_comes_through_as_it_is() -> None:
    torch.manual_seed(0)
    up = lively(Up(8, 4, gated=False)).eval()
    deep, skip = torch.randn(2, 8, 5, 3), torch.randn(2, 4, 10, 6)
    with torch.inference_mode():
        wide = F.interpolate(up.project(deep), scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(up(deep, skip), up.block(torch.cat((skip, wide), dim=1)))
    assert not [name for name in up.state_dict() if "gate" in name]


def test_where_the_level_below_was_rounded_up_the_last_row_and_column_are_cut_off() -> None:
    torch.manual_seed(0)
    up = lively(Up(8, 4, crop=True)).eval()
    deep, skip = torch.randn(2, 8, 3, 4), torch.randn(2, 4, 5, 7)
    with torch.inference_mode():
        wide = F.interpolate(up.project(deep), scale_factor=2, mode="bilinear", align_corners=False)[:, :, :5, :7]
        torch.testing.assert_close(up(deep, skip), up.block(torch.cat((up.gate(wide, skip), wide), dim=1)))


def test_the_head_of_a_strided_network_gives_the_four_pixels_of_each_place() -> None:
    model = small(stem="strided").eval()
    with torch.inference_mode():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        logits = model(torch.randn(1, 3, 16, 32))
    assert torch.equal(logits[0, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(8, 16))


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
    """With all gates closed, only the deepest level remains: the output ignores the first level's weights."""
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


def test_normalize_copies_its_constants_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    expected = normalize(image)

    def copies(*words: object, **more: object) -> None:
        raise AssertionError("a copy to a GPU waits for all that it has to do")

    monkeypatch.setattr(torch, "tensor", copies)
    assert torch.equal(normalize(image), expected)


def test_normalize_has_gradients_after_a_validation() -> None:
    model_module._kept_statistics.cache_clear()
    with torch.inference_mode():
        normalize(torch.zeros(1, 16, 16, 3))
    image = torch.rand(1, 16, 16, 3, requires_grad=True)
    normalize(image).sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(image.grad[0, 0, 0], 1 / (255 * torch.tensor([0.229, 0.224, 0.225])))


# torch 2.7 warns of the constants that it lifts itself.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node", "ignore:Node lifted_tensor_")
@pytest.mark.parametrize("strict", [False, True])
def test_normalize_can_be_traced_and_keeps_nothing_of_it(strict: bool) -> None:
    class Normalize(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return normalize(image)

    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    model_module._kept_statistics.cache_clear()
    traced = torch.export.export(Normalize(), (image,), strict=strict).module()
    compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager")
    for answer in (traced(image), compiled(image), normalize(image)):
        assert type(answer) is torch.Tensor
        assert torch.equal(answer, normalize(image))
