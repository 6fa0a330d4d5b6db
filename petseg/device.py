"""Choose the device to compute on, and the precision."""

from __future__ import annotations

import torch

from petseg_runtime.errors import EngineError, UsageError
from petseg_runtime.host import features

__all__ = ["pick_device", "pick_precision"]


def pick_device(name: str) -> torch.device:
    """Returns the named device; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        EngineError: The name is not a device, or the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"--device {name!r} is not a device; auto, cpu, cuda or cuda:N is expected") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        if torch.version.cuda is None and torch.version.hip is None:
            raise EngineError(
                f"--device {name}: this PyTorch ({torch.__version__}) is built for the CPU alone; install a build for "
                "CUDA, or use the CPU with --device cpu"
            )
        raise EngineError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; check the driver with "
            "nvidia-smi, or use the CPU with --device cpu"
        )
    if device.type not in ("cuda", "cpu"):
        raise EngineError(f"--device {name}: checkpoints are trained and measured on cuda or cpu")
    return device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """Returns the precision for ``amp``; auto is bf16 if the hardware supports it, else fp16 on GPUs and fp32 on CPUs.

    Raises:
        UsageError: fp16 on a CPU, where gradients would underflow because they are not scaled; or bf16 on a GPU for
            which cuDNN has no convolutions in bf16.
    """
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _gpu_has_bf16(device) else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[amp]
    if dtype is torch.float16 and device.type == "cpu":
        raise UsageError("amp is fp16 on a CPU: gradients would underflow; use bf16 or fp32")
    if dtype is torch.bfloat16 and device.type == "cuda" and not _gpu_has_bf16(device):
        raise UsageError(f"amp is bf16, which {torch.cuda.get_device_name(device)} does not compute; use fp16 or fp32")
    return dtype


def _gpu_has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16: Ampere and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(features())
