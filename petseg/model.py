"""The attention U-Net, whole, on one page.

A U-Net (Ronneberger et al. 2015, arXiv:1505.04597) whose skip connections pass through additive attention gates
(Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas", arXiv:1804.03999, eq. 1 and 2).
The published pet network is ``AttentionUNetConfig()``: 29,300,205 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["STRIDE", "AttentionGate", "AttentionUNet", "AttentionUNetConfig", "ConvBlock", "normalize"]

#: Four 2x2 poolings: height and width must be divisible by this.
STRIDE = 16

#: Channel means and standard deviations of ImageNet photos in [0, 1], RGB (the convention of torchvision).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class AttentionUNetConfig:
    """Everything that decides the network's shape.

    Attributes:
        width: Channels of the first level; each of the four levels below doubles them. 64 is the published
            network (64-128-256-512-1024), 16 the edge size (1.83 M parameters). Even and positive.
    """

    width: int = 64

    def __post_init__(self) -> None:
        """Check the width.

        Raises:
            ValueError: The width is odd (the gates halve it) or not positive.
        """
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}; the attention gates halve it, so it must be even and positive")

    @property
    def channels(self) -> tuple[int, int, int, int, int]:
        """Channels of the five levels, from full resolution down."""
        w = self.width
        return w, 2 * w, 4 * w, 8 * w, 16 * w


class ConvBlock(nn.Sequential):
    """(3x3 convolution without bias, BatchNorm, ReLU) twice; keeps height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class AttentionGate(nn.Module):
    """Additive attention (Oktay et al. 2018): which pixels of the skip matter, judged by the coarser level.

    ``alpha = sigmoid(psi(relu(W_g g + W_x x)))``, one value per pixel; returns ``alpha * x``.
    W_g, W_x and psi are 1x1 convolutions, each followed by BatchNorm; half the channels inside.
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
    """One decoder level: bilinear x2 and a 1x1 convolution, the gated skip beside it, then a ConvBlock.

    The 1x1 convolution runs before the interpolation: both are linear and the interpolation's weights sum to 1, so
    the order changes nothing but the cost, which falls to a quarter.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(inputs, outputs, 1)
        self.gate = AttentionGate(outputs)
        self.block = ConvBlock(2 * outputs, outputs)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """``deep`` [N, 2C, H/2, W/2] and ``skip`` [N, C, H, W] to [N, C, H, W]."""
        up = self.project(deep)  # [N, C, H/2, W/2]
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)  # [N, C, H, W]
        return self.block(torch.cat((self.gate(up, skip), up), dim=1))  # type: ignore[no-any-return]


class AttentionUNet(nn.Module):
    """Attention U-Net with one output channel.

    Input: float [N, 3, H, W], normalised (see :func:`normalize`), H and W divisible by 16.
    Output: logits, float [N, 1, H, W]; ``sigmoid`` of them is the probability of pet.
    """

    def __init__(self, config: AttentionUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config or AttentionUNetConfig()
        c1, c2, c3, c4, c5 = self.config.channels
        self.down1 = ConvBlock(3, c1)
        self.down2 = ConvBlock(c1, c2)
        self.down3 = ConvBlock(c2, c3)
        self.down4 = ConvBlock(c3, c4)
        self.bottom = ConvBlock(c4, c5)
        self.up4 = Up(c5, c4)
        self.up3 = Up(c4, c3)
        self.up2 = Up(c3, c2)
        self.up1 = Up(c2, c1)
        self.head = nn.Conv2d(c1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, 1, H, W] of a normalised image [N, 3, H, W].

        Raises:
            ValueError: H or W is not divisible by 16, or the image does not have 3 channels.
        """
        check_input(image.shape)
        x1 = self.down1(image)  # [N, c1, H, W]
        x2 = self.down2(F.max_pool2d(x1, 2))  # [N, c2, H/2, W/2]
        x3 = self.down3(F.max_pool2d(x2, 2))  # [N, c3, H/4, W/4]
        x4 = self.down4(F.max_pool2d(x3, 2))  # [N, c4, H/8, W/8]
        deep = self.bottom(F.max_pool2d(x4, 2))  # [N, c5, H/16, W/16]
        deep = self.up4(deep, x4)  # [N, c4, H/8, W/8]
        deep = self.up3(deep, x3)  # [N, c3, H/4, W/4]
        deep = self.up2(deep, x2)  # [N, c2, H/2, W/2]
        deep = self.up1(deep, x1)  # [N, c1, H, W]
        return self.head(deep)  # type: ignore[no-any-return]


def check_input(shape: torch.Size) -> None:
    """Raise the ``ValueError`` that names what is wrong with an input shape, if anything is."""
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"input shape is {tuple(shape)}; [N, 3, H, W] is expected")
    height, width = shape[2:]
    if height % STRIDE or width % STRIDE or not height or not width:
        raise ValueError(f"input is {height} x {width}; height and width must be positive multiples of {STRIDE}")


def normalize(image: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] RGB to what the network takes: float32 [N, 3, H, W], ImageNet mean 0 and deviation 1."""
    mean = torch.tensor(IMAGE_MEAN, device=image.device)
    std = torch.tensor(IMAGE_STD, device=image.device)
    scaled = (image.to(torch.float32) / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2)  # channels_last in memory
