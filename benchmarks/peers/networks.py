"""Write the peers' networks with random weights, for speed only, as PyTorch weights and as ONNX files.

    python -m benchmarks.peers.networks FOLDER

Runs in the peers' interpreter. Nothing is downloaded: no pretrained weights are requested.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.peers.shape import Smooth
from benchmarks.peers.u2net import SIZE as U2NET_SIZE
from benchmarks.peers.u2net import U2Net

#: Input height and width of NETWORKS: the largest size of petseg's models.
SIZE: Final = 256


def _smp(kind: str, encoder: str) -> nn.Module:
    smp = importlib.import_module("segmentation_models_pytorch")
    network: nn.Module = getattr(smp, kind)(encoder, encoder_weights=None, classes=1)
    return network


def _torchvision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models.segmentation")
    network: nn.Module = getattr(models, name)(weights=None, weights_backbone=None, num_classes=1)
    return network


#: Networks with a single mask as output, from a photo with ImageNet normalisation.
NETWORKS: Final[dict[str, Callable[[], nn.Module]]] = {
    "lraspp_mobilenet_v3_large": lambda: _torchvision("lraspp_mobilenet_v3_large"),
    "deeplabv3_mobilenet_v3_large": lambda: _torchvision("deeplabv3_mobilenet_v3_large"),
    "fpn_resnet34": lambda: _smp("FPN", "resnet34"),
}
#: Networks that rembg runs, from ONNX.
U2NETS: Final[dict[str, Callable[[], nn.Module]]] = {"u2net": U2Net, "u2netp": lambda: U2Net(light=True)}


class Probability(nn.Module):
    """A network whose output is the probability of its one class, float32 [N, H, W]; see shape.py for its content."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.smooth = network, Smooth(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        answer: Any = self.network(x)  # torchvision's networks return a dictionary
        probability: Tensor = self.smooth(answer["out"] if isinstance(answer, dict) else answer)
        return probability.squeeze(1)


def opened(name: str, weights: Path) -> nn.Module:
    """Load a network with its weights, ready to run."""
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights))
    return Probability(network).eval()


def settled(network: nn.Module, size: int) -> nn.Module:
    """Set the BatchNorm statistics of random weights from noise, so that activations have ordinary magnitudes.

    Otherwise signals could fade layer by layer to subnormal numbers, on which processors are slow.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(2, 3, size, size))
    return network.eval()


def write(folder: Path) -> None:
    """Write ``NAME.safetensors`` and ``NAME.onnx`` for every network."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in {**NETWORKS, **U2NETS}.items():
        torch.manual_seed(0)
        size = SIZE if name in NETWORKS else U2NET_SIZE
        network = settled(build(), size)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        model = Probability(network).eval() if name in NETWORKS else network
        example = torch.zeros(1, 3, size, size)
        torch.onnx.export(model, (example,), folder / f"{name}.onnx", dynamo=True, external_data=False, verbose=False)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
