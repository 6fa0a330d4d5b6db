"""The attention U-Net, complete on one page.

A U-Net (Ronneberger et al. 2015, arXiv:1505.04597) whose skip connections pass through additive attention gates
(Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas", arXiv:1804.03999, eq. 1 and 2).
The published pet network is ``AttentionUNetConfig()``: 29,300,205 parameters. The edge network is the same code with
another config, ``AttentionUNetConfig(width=16, stem="strided")``: 1,834,680 parameters, 1/63 of the arithmetic.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petseg_runtime.spec import STRIDE

__all__ = ["AttentionGate", "AttentionUNet", "AttentionUNetConfig", "ConvBlock", "normalize"]

#: Channel means and standard deviations of ImageNet photos in [0, 1], RGB (as in torchvision).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

#: A convolution of more channels would need terabytes; with still more, the size of its weights overflows in PyTorch.
MOST_CHANNELS: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class AttentionUNetConfig:
    """The architecture of the network. The defaults are the published one.

    Attributes:
        width: Base number of channels. 64 in the published network. Even and positive.
        levels: Channels of each level, finest first, in multiples of ``width``.
        stem: ``full`` keeps the first level at the image's resolution (published). ``strided`` halves the resolution in
            the first convolution, and the head outputs four pixels per position, a sub-pixel convolution (Shi et al.
            2016, arXiv:1609.05158): a quarter of the cost at every level.
        ungated: Levels whose skip connections have no attention gate, 1 being the finest. Published: none.
        decoder_convs: 3x3 convolutions per decoder block, 1 or 2 (published).
    """

    width: int = 64
    levels: tuple[int, ...] = (1, 2, 4, 8, 16)
    stem: Literal["full", "strided"] = "full"
    ungated: tuple[int, ...] = ()
    decoder_convs: int = 2

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: The width is odd (the gates halve it) or not positive, or another field has an invalid value.
        """
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}; the attention gates halve it, so it must be even and positive")
        if len(self.levels) < 2 or min(self.levels) < 1:
            raise ValueError(f"levels are {list(self.levels)}; there must be 2 or more, each a multiple of 1 or more")
        if max(self.channels) > MOST_CHANNELS:
            raise ValueError(f"width is {self.width}; a level of {max(self.channels)} channels is beyond any memory")
        if self.stem not in ("full", "strided"):
            raise ValueError(f"stem is {self.stem!r}; it must be 'full' or 'strided'")
        skips = len(self.levels) - 1
        if odd := [level for level in self.ungated if not 1 <= level <= skips]:
            raise ValueError(f"ungated names level {odd[0]}; there are skips at levels 1 to {skips}")
        if self.decoder_convs not in (1, 2):
            raise ValueError(f"decoder_convs is {self.decoder_convs}; it must be 1 or 2")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the levels, from the finest down."""
        return tuple(self.width * level for level in self.levels)


class ConvBlock(nn.Sequential):
    """(3x3 convolution without bias, BatchNorm, ReLU), ``convs`` times.

    Keeps height and width; a ``stride`` in the first convolution divides them.
    """

    def __init__(self, inputs: int, outputs: int, *, convs: int = 2, stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for i in range(convs):
            into, step = (outputs, 1) if i else (inputs, stride)
            conv = nn.Conv2d(into, outputs, 3, stride=step, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class AttentionGate(nn.Module):
    """Additive attention (Oktay et al. 2018): the coarser level decides which pixels of the skip connection matter.

    ``alpha = sigmoid(psi(relu(W_g g + W_x x)))``, one value per pixel; returns ``alpha * x``.
    W_g, W_x and psi are 1x1 convolutions, each followed by BatchNorm, with half the channels in between.

    Oktay et al. compute alpha at the coarser level's resolution and resample it to the skip's. Here, :class:`Up` has
    already upsampled and projected g, so that alpha is computed at the skip's full resolution. Their equation also has
    no BatchNorm, and no bias in W_x.

    BatchNorm subtracts the mean, so the biases of the three convolutions have no effect. They stay because the
    parameter count of the published network, 29,300,205, includes them: without those 964 it would be 29,299,241.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = channels // 2
        self.w_g = nn.Sequential(nn.Conv2d(channels, inside, 1), nn.BatchNorm2d(inside))
        self.w_x = nn.Sequential(nn.Conv2d(channels, inside, 1), nn.BatchNorm2d(inside))
        self.psi = nn.Sequential(nn.Conv2d(inside, 1, 1), nn.BatchNorm2d(1))

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        """Gate the skip ``x`` [N, C, H, W] by the decoder's ``g`` [N, C, H, W]; returns [N, C, H, W]."""
        alpha = torch.sigmoid(self.psi(F.relu(self.w_g(g) + self.w_x(x))))  # [N, 1, H, W]
        return alpha * x


class Up(nn.Module):
    """One decoder level: 1x1 convolution, bilinear x2, concatenation with the gated skip, then a ConvBlock.

    The 1x1 convolution comes before the interpolation: both are linear and the interpolation weights sum to 1, so the
    order changes only the cost, which is a quarter.
    """

    def __init__(self, inputs: int, outputs: int, *, gated: bool = True, convs: int = 2, crop: bool = False) -> None:
        """Build the level.

        Args:
            inputs: Channels of the level below.
            outputs: Channels of this level and of its skip.
            gated: Whether the skip has an attention gate.
            convs: 3x3 convolutions in the block.
            crop: Whether the size of the level below was rounded up, so that twice that size may be a pixel too large.
        """
        super().__init__()
        self.project = nn.Conv2d(inputs, outputs, 1)
        self.gate = AttentionGate(outputs) if gated else None
        self.block = ConvBlock(2 * outputs, outputs, convs=convs)
        self.crop = crop

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Map ``deep`` [N, D, H/2, W/2] and ``skip`` [N, C, H, W] to [N, C, H, W]."""
        up = self.project(deep)  # [N, C, H/2, W/2]
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)  # [N, C, H, W]
        if self.crop:
            up = up[:, :, : skip.shape[2], : skip.shape[3]]
        if self.gate is not None:
            skip = self.gate(up, skip)
        return self.block(torch.cat((skip, up), dim=1))  # type: ignore[no-any-return]


class AttentionUNet(nn.Module):
    """Attention U-Net with one output channel.

    Input: float [N, 3, H, W], normalised (see :func:`normalize`), H and W divisible by 16.
    Output: logits, float [N, 1, H, W]; their ``sigmoid`` is the probability of pet.

    Its modules, in order: ``down1``, ``down2``, ... (one per level), ``bottom`` (the coarsest), ..., ``up2``, ``up1``,
    ``head``. From the fifth halving on, if there are that many, sizes are rounded up.
    """

    def __init__(self, config: AttentionUNetConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or AttentionUNetConfig()
        self.factor = 2 if c.stem == "strided" else 1  # from the first level's height to the image's
        exact = 4 if self.factor == 1 else 3  # number of poolings of a multiple of 16 without remainder
        self.rounds = [level > exact for level in range(1, len(c.channels))]
        for level, (inputs, outputs) in enumerate(itertools.pairwise((3, *c.channels)), start=1):
            name = f"down{level}" if level < len(c.channels) else "bottom"
            self.add_module(name, ConvBlock(inputs, outputs, stride=self.factor if level == 1 else 1))
        for level in range(len(c.channels) - 1, 0, -1):
            outputs, inputs = c.channels[level - 1 : level + 1]
            gated, crop = level not in c.ungated, self.rounds[level - 1]
            self.add_module(f"up{level}", Up(inputs, outputs, gated=gated, convs=c.decoder_convs, crop=crop))
        self.head = nn.Conv2d(c.channels[0], self.factor**2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits [N, 1, H, W] of a normalised image [N, 3, H, W].

        Raises:
            ValueError: H or W is not divisible by 16, or the image does not have 3 channels.
        """
        return self.with_features(image)[0]

    def with_features(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`forward`, but also returns the output of each block except the head, by the block's name.

        In the shapes below, H and W are those of the first level: with a strided stem, half the image's.

        Raises:
            ValueError: H or W is not divisible by 16, or the image does not have 3 channels.
        """
        check_input(image.shape)
        deep, made = image, {}
        for level, rounds in enumerate(self.rounds, start=1):
            made[f"down{level}"] = deep = self.get_submodule(f"down{level}")(deep)  # [N, c1, H, W], [N, c2, H/2, W/2]
            deep = F.max_pool2d(deep, 2, ceil_mode=rounds)
        made["bottom"] = deep = self.get_submodule("bottom")(deep)  # [N, c5, H/16, W/16] with five levels
        for level in range(len(self.rounds), 0, -1):
            skip = made[f"down{level}"]
            made[f"up{level}"] = deep = self.get_submodule(f"up{level}")(deep, skip)  # ..., [N, c1, H, W]
        logits = self.head(deep)  # [N, 1, H, W]; with a strided stem [N, 4, H, W], four pixels per position
        return (logits if self.factor == 1 else F.pixel_shuffle(logits, self.factor)), made


def check_input(shape: torch.Size) -> None:
    """Raises ValueError if an input has the wrong shape; the message names what is wrong."""
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"input shape is {tuple(shape)}; [N, 3, H, W] is expected")
    height, width = shape[2:]
    if height % STRIDE or width % STRIDE or not height or not width:
        raise ValueError(f"input is {height} x {width}; height and width must be positive multiples of {STRIDE}")


def normalize(image: Tensor) -> Tensor:
    """Convert uint8 [N, H, W, 3] RGB to the network's input: float32 [N, 3, H, W], ImageNet mean 0 and deviation 1."""
    # A tensor that is made while a graph is traced belongs to that graph, and must not be cached for others.
    mean, std = _statistics(image.device) if torch.compiler.is_compiling() else _kept_statistics(image.device)
    scaled = (image.to(torch.float32) / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2)  # channels_last in memory


@torch.inference_mode(False)  # made during validation, they must also be usable in a training step
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """:data:`IMAGE_MEAN` and :data:`IMAGE_STD` on a device, float32 [3]."""
    return torch.tensor(IMAGE_MEAN, device=device), torch.tensor(IMAGE_STD, device=device)


#: Cached per device, because copying them to a GPU at every step would wait for all its pending work.
_kept_statistics = functools.cache(_statistics)
