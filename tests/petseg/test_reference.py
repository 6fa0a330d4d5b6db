"""A checkpoint in PyTorch: bytes in, bytes out, according to the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from petseg.checkpoint import save_checkpoint
from petseg.model import AttentionUNet, normalize
from petseg.reference import open_checkpoint, torch_run
from petseg_runtime.errors import CheckpointError


def test_a_network_runs_on_bytes(model: AttentionUNet) -> None:
    batch = np.random.default_rng(1).integers(0, 256, (3, 16, 32, 3), np.uint8)
    got = torch_run(model)(batch)
    with torch.no_grad():
        logits = model(normalize(torch.from_numpy(batch)))[:, 0].double().numpy()
    assert got.dtype == np.uint8
    assert got.shape == (3, 16, 32)
    assert len(np.unique(got)) > 50
    assert (got == np.rint(255 / (1 + np.exp(-logits)))).mean() > 0.99


def test_a_network_is_measured_in_evaluation_mode(model: AttentionUNet) -> None:
    batch = np.random.default_rng(1).integers(0, 256, (3, 16, 32, 3), np.uint8)
    want = torch_run(model)(batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (torch_run(model.train())(batch) == want).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_state_of_a_run_is_no_model(model: AttentionUNet, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    state = {f"ema/{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(path, state, {"kind": "training", "model": {"width": 4}})
    with pytest.raises(CheckpointError, match=r"best\.safetensors") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
