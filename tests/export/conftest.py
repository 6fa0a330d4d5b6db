"""One small trained network, its checkpoint and its exported files, shared by all tests of the export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from petseg.checkpoint import save_checkpoint
from petseg.data import Split, find, read_pair
from petseg.losses import bce_dice
from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg_export import ExportConfig, OnnxConfig, OpenVINOConfig, build, export
from petseg_runtime import images
from petseg_runtime.parity import Receipt

SIZE = 32
STEPS = 90

#: A small version of the metadata that `petseg train` writes beside the tensors.
META: dict[str, Any] = {
    "kind": "model",
    "model": {"width": 4},
    "spec": {"height": SIZE, "width": SIZE, "threshold": 0.6, "cutout_threshold": 0.4, "border_target": 0.25},
    "epoch": 3,
    "data": {"folder": "pets", "train_photos": 22, "val_photos": 2},
    "validation": {"epoch": 3, "val_iou": 0.912345, "val_dice": 0.954321, "seconds": 1.5},
    "provenance": {"command": "petseg train"},
    "versions": {"petseg": "0.1.0", "torch": "2.0"},
}


@dataclass(frozen=True)
class Trained:
    """A network that finds the ellipses of `oxford_root`, also half-way through training. Copy before changing."""

    model: AttentionUNet
    earlier: AttentionUNet


@dataclass(frozen=True)
class Exported:
    file: Path
    receipt: Receipt


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """With networks this small, threads cost more than they gain, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(oxford_root: Path) -> Trained:
    pairs = [read_pair(pair) for pair in find(oxford_root, Split.TRAINVAL)]
    photos = torch.from_numpy(np.stack([images.to_model(photo, SIZE, SIZE) for photo, _ in pairs]))
    pets = [
        images.to_model(np.repeat((trimap == 1)[..., None] * np.uint8(255), 3, 2), SIZE, SIZE) for _, trimap in pairs
    ]
    target = torch.from_numpy(np.stack(pets))[..., 0].unsqueeze(1) / 255
    torch.manual_seed(0)
    model = AttentionUNet(AttentionUNetConfig(width=4)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    earlier = model
    for step in range(STEPS):
        if step == STEPS // 2:
            earlier = copy.deepcopy(model).eval()
        chosen = torch.randperm(len(photos))[:8]
        loss = bce_dice(model(normalize(photos[chosen])), target[chosen], 0.5, 0.5, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Trained(model.eval(), earlier)


@pytest.fixture(scope="session")
def photos(oxford_root: Path) -> list[Path]:
    """30 photos: enough for a receipt that is not a smoke test."""
    return sorted((oxford_root / "images").iterdir())


@pytest.fixture(scope="session")
def meta() -> dict[str, Any]:
    """The JSON metadata of `checkpoint_file`, copied. Read only."""
    return copy.deepcopy(META)


@pytest.fixture(scope="session")
def checkpoint_file(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_checkpoint(path, trained.model.state_dict(), META)
    return path


#: Exports the session's checkpoint with a config.
Make = Callable[[ExportConfig], Exported]


@pytest.fixture(scope="session")
def make_export(
    checkpoint_file: Path, oxford_root: Path, tracer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    def make(config: ExportConfig) -> Exported:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "graph_bytes", tracer)
            done = export(checkpoint_file, config)
        return Exported(done.path, done.receipt)

    return make


@pytest.fixture(scope="session")
def exported(make_export: Make, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The checkpoint as ONNX in fp32, and a receipt of 30 photos without labels. Read only."""
    file = tmp_path_factory.mktemp("exported") / "small.onnx"
    return make_export(OnnxConfig(output=file, data=oxford_root / "images"))


@pytest.fixture(scope="session")
def exported_half(make_export: Make, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same in fp16. Read only."""
    file = tmp_path_factory.mktemp("exported_half") / "small.onnx"
    return make_export(OnnxConfig(output=file, data=oxford_root / "images", precision="fp16"))


@pytest.fixture(scope="session")
def exported_any(make_export: Make, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same in fp32, for any batch and size. Read only."""
    file = tmp_path_factory.mktemp("exported_any") / "small.onnx"
    return make_export(OnnxConfig(output=file, data=oxford_root / "images", dynamic_size=True))


@pytest.fixture(scope="session")
def exported_ir(make_export: Make, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same as an OpenVINO IR in fp32, of 16 photos. Copy the folder before damaging it."""
    file = tmp_path_factory.mktemp("exported_ir") / "small.xml"
    return make_export(OpenVINOConfig(output=file, data=oxford_root / "images", photos=16))


@pytest.fixture(scope="session")
def random_network() -> Callable[..., AttentionUNet]:
    """Networks with random weights; see :func:`make_random`."""
    return make_random


def make_random(seed: int, width: int = 4, size: int = 32, **config: Any) -> AttentionUNet:
    """Random weights, BatchNorm statistics as after long training, and a head whose probabilities spread over 0..1."""
    torch.manual_seed(seed)
    model = AttentionUNet(AttentionUNetConfig(width=width, **config)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    with torch.no_grad():
        logits = model(normalize(torch.from_numpy(draw_images(4, size, size, seed))))
        scale = 2 / logits.std()
        model.head.weight.mul_(scale)
        model.head.bias.copy_((model.head.bias - logits.mean()) * scale)
    return model


@pytest.fixture(scope="session")
def random_images() -> Callable[..., np.ndarray]:
    """Images on which no network has a constant output; see :func:`draw_images`."""
    return draw_images


def draw_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour fields with noise, uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(-2, 2, (count * 3, 3))]  # each [H, W] in -1..1
    fields = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
    return np.clip(127 + 100 * fields + rng.normal(0, 20, fields.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def notes_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"measured": {"iou": 0.9}}), encoding="utf-8")
    return path
