"""The EMA follows its formula, including buffers, and with a decay of 0 is the network itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from petseg.ema import MovingAverage


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def set_to(model: nn.Module, value: float) -> None:
    """Set every weight and statistic; counters become the integer part."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value if tensor.is_floating_point() else int(value))


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.5, 0.998]),
)
def test_it_is_the_average_of_its_formula(values: list[float], decay: float) -> None:
    model = network()
    average = MovingAverage(model, decay)
    expected = values[0]
    for n, value in enumerate(values):
        set_to(model, value)
        average.update(model)
        kept = min(decay, (1 + n) / (10 + n)) if n else 0.0  # the random initial weights do not count
        expected = kept * expected + (1 - kept) * value
    for name, tensor in average.module.state_dict().items():
        wanted = expected if tensor.is_floating_point() else float(int(values[-1]))
        torch.testing.assert_close(
            tensor.double(), torch.full_like(tensor, wanted, dtype=torch.float64), rtol=1e-4, atol=1e-4, msg=name
        )
    assert average.updates == len(values)


def test_the_network_and_its_average_share_no_memory() -> None:
    model = network()
    average = MovingAverage(model, 0.5)
    average.update(model)
    before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    set_to(model, 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in average.module.state_dict().items())
    assert not any(tensor.requires_grad and tensor.grad is not None for tensor in average.module.parameters())
