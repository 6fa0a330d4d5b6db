"""The choice of the device and the precision."""

from __future__ import annotations

import re

import pytest
import torch

from petseg import device as device_module
from petseg.device import pick_device, pick_precision
from petseg_runtime.errors import EngineError, UsageError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.2")


@pytest.mark.parametrize(("gpus", "kind"), [(0, "cpu"), (1, "cuda")])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, gpus: int, kind: str) -> None:
    with_gpus(monkeypatch, gpus)
    assert pick_device("auto").type == kind


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there_is_used_as_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_gpus(monkeypatch, 2)
    assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize(("gpus", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2"), (2, "cuda:99")])
def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(EngineError, match=rf"--device {name}: PyTorch sees {gpus} CUDA GPUs") as caught:
        pick_device(name)
    assert "--device cpu" in str(caught.value), "the remedy"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("hip", "said"), [(None, "is built for the CPU alone; install"), ("7.0", "check the driver")])
def test_a_pytorch_for_the_cpu_is_not_a_matter_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, said: str
) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(EngineError, match=f"^--device cuda: .*{said}.*--device cpu$"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:-1", "cuda:x", "0"])
def test_what_is_no_device_is_rejected_with_the_choices(name: str) -> None:
    with pytest.raises(EngineError, match=re.escape(f"--device {name!r} is not a device; auto, cpu, cuda or cuda:N")):
        pick_device(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_petseg_does_not_know_are_rejected(name: str) -> None:
    with pytest.raises(EngineError, match="cuda or cpu"):
        pick_device(name)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_that_was_asked_for_is_what_is_computed_in(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, amp: str, dtype: torch.dtype
) -> None:
    with_gpus(monkeypatch, 1)
    assert pick_precision(amp, device) is dtype


def test_fp16_is_for_gpus_alone() -> None:
    assert pick_precision("fp16", GPU) is torch.float16
    with pytest.raises(UsageError, match="bf16 or fp32"):
        pick_precision("fp16", CPU)


def test_bf16_is_for_gpus_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UsageError, match="amp is bf16, which Tesla T4 does not compute; use fp16 or fp32"):
        pick_precision("bf16", GPU)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_auto_on_a_gpu_is_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    with_gpus(monkeypatch, 1, capability)
    assert pick_precision("auto", GPU) is dtype


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu_is_bf16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, has: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device_module, "_cpu_has_bf16", lambda: has)
    assert pick_precision("auto", CPU) is dtype


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: avx2 avx512f avx512_bf16", True),
        ("flags\t\t: avx2 amx_bf16 amx_int8", True),
        ("Features\t: asimd asimddp bf16", True),
        ("flags\t\t: avx2 avx512f", False),
        ("model name\t: Example bf16 Processor\nflags\t\t: avx2", False),
        ("flags\t\t: avx2 amx_bf16\nflags\t\t: avx2", False),
        ("", False),
    ],
)
def test_bf16_is_looked_for_among_the_features_of_all_cores(
    monkeypatch: pytest.MonkeyPatch, flags: str, has: bool
) -> None:
    monkeypatch.setattr("petseg_runtime.host._text", lambda path: flags)
    assert device_module._cpu_has_bf16() is has
