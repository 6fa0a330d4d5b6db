"""One small trained network, its checkpoint and its exported file, shared by all tests of the export."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from petseg.checkpoint import save_checkpoint
from petseg.data import Split, find, read_pair
from petseg.losses import bce_dice
from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg_export import onnx as onnx_export
from petseg_export import parity
from petseg_runtime import images

SIZE = 32
STEPS = 90

#: What `petseg train` writes beside the tensors, in small.
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
    """A network that finds the ellipses of `oxford_root`, and the same one half-way there. Copy before changing."""

    model: AttentionUNet
    earlier: AttentionUNet


@dataclass(frozen=True)
class Exported:
    file: Path
    receipt: parity.Receipt


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are so small that threads cost more than they give, most of all on a busy machine."""
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
    """The JSON of `checkpoint_file`; a copy for each session's reader to keep whole."""
    return copy.deepcopy(META)


@pytest.fixture(scope="session")
def checkpoint_file(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_checkpoint(path, trained.model.state_dict(), META)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint_file: Path, photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The checkpoint's file. Read only."""
    file = tmp_path_factory.mktemp("exported") / "small.onnx"
    return Exported(file, onnx_export.export_onnx(checkpoint_file, file, photos))


@pytest.fixture
def known_graph(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Spares a test the seconds of tracing the network again: `graph_bytes` gives the graph of `exported`."""
    graph = exported.file.read_bytes()
    monkeypatch.setattr(onnx_export, "graph_bytes", lambda model, spec: graph)
    return graph


@pytest.fixture
def notes_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"measured": {"iou": 0.9}}), encoding="utf-8")
    return path
