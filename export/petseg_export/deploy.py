"""The network as a device sees it: uint8 image in, uint8 probability out."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from petseg.model import IMAGE_MEAN, IMAGE_STD, AttentionUNet

__all__ = ["DeployedUNet", "fold_batchnorm"]


class DeployedUNet(nn.Module):
    """Normalisation, network and sigmoid as one module; the graph that is exported.

    Input: ``image``, uint8 [N, H, W, 3], RGB. Output: ``probability``, uint8 [N, H, W], ``round(255 * p(pet))``.
    The order of the outermost operations is TensorRT's rule for uint8: cast, then permute; squeeze, then cast.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, model: AttentionUNet) -> None:
        """Take a trained network; it is copied, and its BatchNorms are folded into their convolutions."""
        super().__init__()
        self.network = fold_batchnorm(model)
        # (x / 255 - mean) / std as one multiplication and one addition, in NCHW
        std = torch.tensor(IMAGE_STD).reshape(1, 3, 1, 1)
        mean = torch.tensor(IMAGE_MEAN).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] to uint8 [N, H, W]."""
        x = image.to(torch.float32).permute(0, 3, 1, 2)  # [N, 3, H, W]
        logits = self.network(x * self.scale + self.offset)  # [N, 1, H, W]
        probability = torch.round(255 * torch.sigmoid(logits))
        return probability.squeeze(1).to(torch.uint8)


def fold_batchnorm(model: AttentionUNet) -> AttentionUNet:
    """A copy in which every BatchNorm is part of the convolution before it (exact up to rounding).

    Works on the network's blocks, which are all Sequentials of convolution, BatchNorm and perhaps ReLU.
    """
    folded = copy.deepcopy(model).eval()
    for block in folded.modules():
        if not isinstance(block, nn.Sequential):
            continue
        layers = list(block)
        for i, (first, second) in enumerate(itertools.pairwise(layers)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                block[i] = fuse_conv_bn_eval(first, second)
                block[i + 1] = nn.Identity()
    return folded
