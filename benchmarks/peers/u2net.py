"""U²-Net (Qin et al. 2020), the network behind rembg's default model, and U²-Net-p, its light one.

rembg downloads trained weights; these are random, good only for measuring speed. All seven outputs are computed, as in
the files that rembg downloads; the first, which rembg writes, is made as smooth as a trained network's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.shape import Smooth

SIZE = 320


class Unit(nn.Sequential):
    """Convolution 3 × 3, BatchNorm, ReLU."""

    def __init__(self, inside: int, outside: int, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(outside), nn.ReLU()
        )


class Block(nn.Module):
    """A small U-Net with a skip around it (RSU-depth), or the same with dilation in place of pooling (RSU-4F).

    Args:
        depth: Number of units on the way down, including the deepest.
        channels: Input, inner and output channels.
        dilated: Dilation instead of pooling; each unit has twice the dilation of the one above.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int], dilated: bool = False) -> None:
        super().__init__()
        inside, middle, outside = channels
        reach = [2**level if dilated else 1 for level in range(depth - 1)]
        self.first = Unit(inside, outside)
        self.down = nn.ModuleList(Unit(middle if n else outside, middle, d) for n, d in enumerate(reach))
        self.bottom = Unit(middle, middle, 2 ** (depth - 1) if dilated else 2)
        self.up = nn.ModuleList(Unit(2 * middle, middle if n else outside, d) for n, d in enumerate(reach))
        self.pooled = not dilated

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips: list[Tensor] = []
        h: Tensor = x
        for level, unit in enumerate(self.down):
            h = unit(_halved(h) if level and self.pooled else h)
            skips.append(h)
        h = self.bottom(h)
        for unit, skip in zip(reversed(self.up), reversed(skips), strict=True):
            h = unit(torch.cat([_as_large_as(h, skip), skip], 1))
        return h + x


class U2Net(nn.Module):
    """Eleven blocks in a U shape, with a mask at each of the six levels.

    Args:
        light: U²-Net-p, with 1.1 M instead of 44 M parameters.
    """

    def __init__(self, light: bool = False) -> None:
        super().__init__()
        outside = (64,) * 6 if light else (64, 128, 256, 512, 512, 512)
        middle = (16,) * 6 if light else (32, 32, 64, 128, 256, 256)
        back = (64,) * 5 if light else (64, 64, 128, 256, 512)
        back_middle = (16, *middle[1:5])
        depths = (7, 6, 5, 4, 4, 4)
        above, below = (3, *outside[:5]), (*back[1:], outside[5])
        self.down = nn.ModuleList(Block(depths[n], (above[n], middle[n], outside[n]), n > 3) for n in range(6))
        self.up = nn.ModuleList(
            Block(depths[n], (outside[n] + below[n], back_middle[n], back[n]), n > 3) for n in range(5)
        )
        self.sides = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for channels in (*back, outside[5]))
        self.fuse = nn.Conv2d(6, 1, 1)
        self.smooth = Smooth(SIZE)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels: list[Tensor] = []
        h = x
        for number, block in enumerate(self.down):
            h = block(_halved(h) if number else h)
            levels.append(h)
        for number in reversed(range(5)):
            skip = levels[number]
            levels[number] = self.up[number](torch.cat([_as_large_as(levels[number + 1], skip), skip], 1))
        masks = [_as_large_as(side(level), x) for side, level in zip(self.sides, levels, strict=True)]
        return (self.smooth(self.fuse(torch.cat(masks, 1))), *(torch.sigmoid(mask) for mask in masks))


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _as_large_as(x: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(x, size=other.shape[2:], mode="bilinear")
