from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg.run_state import BEST
from petseg.train import Trainer
from tiny_runs import CPU, Recorder, Run, tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: these networks are so small that threads cost more than they gain, mostly on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the state after every epoch, however busy the disk is."""
    monkeypatch.setattr("petseg.run_state.QUICK_SAVE", math.inf)


@pytest.fixture(scope="session")
def whole(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run. Read only."""
    folder, observer = tmp_path_factory.mktemp("whole"), Recorder()
    trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer, provenance={"command": "tests"})
    assert trainer.fit() == folder / BEST
    return Run(folder, observer, trainer)


@pytest.fixture(scope="session")
def model() -> AttentionUNet:
    """Random weights, with a head for which the probabilities on photos like `oxford_root`'s spread over 0..1."""
    torch.manual_seed(3)
    net = AttentionUNet(AttentionUNetConfig(width=4)).eval()
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
        logits = net(normalize(torch.from_numpy(photos)))
        scale = 2 / logits.std()
        net.head.weight.mul_(scale)
        net.head.bias.copy_((net.head.bias - logits.mean()) * scale)
    return net
