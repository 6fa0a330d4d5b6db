from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petseg.run_state import BEST
from petseg.train import Trainer
from tiny_runs import CPU, Recorder, Run, tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are so small that threads cost more than they give, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is saved after every epoch, however busy the disk of this machine is."""
    monkeypatch.setattr("petseg.run_state.QUICK_SAVE", math.inf)


@pytest.fixture(scope="session")
def whole(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed. To be read only."""
    folder, observer = tmp_path_factory.mktemp("whole"), Recorder()
    trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer, provenance={"command": "tests"})
    assert trainer.fit() == folder / BEST
    return Run(folder, observer, trainer)
