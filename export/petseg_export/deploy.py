"""The network as it is exported: uint8 image in, uint8 probability out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from petseg.model import IMAGE_MEAN, IMAGE_STD, AttentionUNet
from petseg_runtime.spec import HALF_LIMIT

__all__ = ["HALF_LIMIT", "DeployedUNet", "activation_peaks", "fold_batchnorm"]


class DeployedUNet(nn.Module):
    """Normalisation, network and sigmoid in one module: the graph that is exported.

    Input: ``image``, uint8 [N, H, W, 3], RGB. Output: ``probability``, uint8 [N, H, W], ``round(255 * p(pet))``.
    TensorRT requires that a uint8 input is cast first and a uint8 output last: so cast, then permute; squeeze, then
    cast.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, model: AttentionUNet, half: Set[str] = frozenset()) -> None:
        """Copy a trained network and fold its BatchNorms into the convolutions.

        Args:
            model: The network, float32.
            half: Names of the convolutions that compute in float16, as :func:`activation_peaks` returns them. The
                operations between them follow their type; normalisation and the last sigmoid are always float32.
        """
        super().__init__()
        self.network = fold_batchnorm(model)
        if half:
            _set_dtypes(self.network, half)
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
        probability = torch.round(255 * torch.sigmoid(logits.to(torch.float32)))
        return probability.squeeze(1).to(torch.uint8)


class TypedConv(nn.Module):
    """A convolution that computes in a fixed dtype and casts its input to it."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = conv.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C, H, W] of any dtype to [N, C', H, W] of the convolution's dtype."""
        return self.conv(x.to(self.conv.weight.dtype))  # type: ignore[no-any-return]


def activation_peaks(model: AttentionUNet, images: Iterable[npt.NDArray[np.uint8]]) -> dict[str, float]:
    """Measure the largest absolute value that float16 would have to represent in each convolution, over some photos.

    Args:
        model: The network, float32.
        images: uint8 [H, W, 3] each.

    Returns:
        The maximum over input, weights, bias and output, by the convolution's name, in the network's order.
    """
    deployed = DeployedUNet(model)
    peaks = {
        name: max(float(p.detach().abs().max()) for p in module.parameters())
        for name, module in deployed.network.named_modules()
        if isinstance(module, nn.Conv2d)
    }

    def watch(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        peaks[name] = max(peaks[name], float(inputs[0].abs().max()), float(output.abs().max()))

    for name, module in deployed.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: watch(name, inputs, output))
    with torch.inference_mode():
        for image in images:
            deployed(torch.from_numpy(image[None]))
    return peaks


def _set_dtypes(network: AttentionUNet, half: Set[str]) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            dtype = torch.float16 if name in half else torch.float32
            network.get_submodule(parent).register_module(child, TypedConv(module, dtype))


def fold_batchnorm(model: AttentionUNet) -> AttentionUNet:
    """Return a copy with every BatchNorm folded into the preceding convolution (exact up to rounding).

    Relies on the network's blocks: all are Sequentials of convolution, BatchNorm and optionally ReLU.
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
