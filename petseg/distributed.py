"""Distributed training: several processes (ranks) started by ``torchrun --nproc-per-node N -m petseg.cli train ...``.

Each rank computes on its own device with its own part of every batch, so that N ranks take the same steps as a single
process, up to rounding: BatchNorm statistics and the sums of the Dice loss are all-reduced over the whole batch, and
DistributedDataParallel averages the gradients. Each rank holds all photos and runs the teacher itself.

With several GPUs, steps are not issued ahead of the device as with one: in every layer, nn.SyncBatchNorm makes the CPU
wait for the counts of all ranks, because the shape of a tensor depends on their values.

Built and tested with gloo on the CPU and two processes; we have never run it on several GPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from petseg.device import pick_device
from petseg_runtime.errors import EngineError, FirstRankFailed, TrainingError
from petseg_runtime.text import counted

__all__ = ["Ranks", "SyncedBatchNorm", "join", "local_device", "synchronized"]

#: How long a rank waits for the others. Rank 0 validates alone meanwhile, so it is not short.
TIMEOUT: Final = timedelta(minutes=30)
#: Errors of gloo and NCCL about a lost peer, which have no exception class. Errors of this process or machine, like a
#: missing network interface or one GPU for two ranks, have other messages.
PEER_LOST: Final = re.compile(
    r"gloo/transport/\w+/(pair|buffer|unbound_buffer)\.|pair closure|Connection (closed|reset) by peer"
    r"|ncclRemoteError|NCCL communicator was aborted|NCCL operations have failed or timed out"
    r"|collective operation timeout"
)


@dataclass(frozen=True)
class Ranks:
    """Rank and world size. The default is a single process, for which nothing here communicates."""

    rank: int = 0
    size: int = 1
    #: Number of ranks on this machine, which share its cores and memory.
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce: returns the sum over all ranks, in the same shape; gradients flow back to each rank."""
        return tensor if self.size == 1 else _Sum.apply(tensor)

    def same(self, digest: str, device: torch.device) -> bool:
        """Whether all ranks pass the same digest (hexadecimal, of equal length); all ranks get the same answer."""
        if self.size == 1:
            return True
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        with _collective():
            dist.all_gather(all_, mine)
        return all(torch.equal(one, mine) for one in all_)

    def on_first(self, action: Callable[[], float], device: torch.device) -> float:
        """Run ``action`` on rank 0 while the others wait; returns its result on all ranks.

        Raises:
            FirstRankFailed: It failed on rank 0. (There, its own error is raised.)
            TrainingError: Another rank ended, or did not answer in time.
        """
        if self.size == 1:
            return action()
        answer = torch.zeros(2, dtype=torch.float64, device=device)  # done or not, value
        if not self.first:
            with _collective():
                dist.broadcast(answer, 0)
            done, value = answer.tolist()
            if not done:
                raise FirstRankFailed("rank 0 of this run failed; see its message")
            return float(value)
        try:
            answer[1] = action()
            answer[0] = 1
        finally:
            with _collective():
                dist.broadcast(answer, 0)
        return float(answer[1])

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap the network for training (DDP); its weights and their names stay those of ``model``."""
        if self.size == 1:
            return model
        with _collective():
            return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def communicating(self) -> AbstractContextManager[None]:
        """Context for forward and backward calls of a wrapped network, in which PyTorch itself communicates.

        Raises:
            TrainingError: Another rank ended, or did not answer in time.
        """
        return _collective() if self.size > 1 else contextlib.nullcontext()


def local_device(name: str) -> torch.device:
    """Returns the device of this process: for ``cuda``, the GPU whose number is its local rank.

    Raises:
        EngineError: The device is not available, or one GPU was named for several processes.
    """
    device = pick_device(name)
    if device.type == "cpu" or _world() == 1:
        return device
    if device.index is None:  # the index is needed below, also on a machine with one process only
        return _own_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    if _here() > 1:
        raise EngineError(f"--device {name} is one GPU, but there are several processes; use --device cuda")
    return device


def _own_gpu(number: int) -> torch.device:
    """Returns the GPU of this number; raises EngineError if there are fewer."""
    if number >= (gpus := torch.cuda.device_count()):
        raise EngineError(
            f"there are {_here()} processes on this machine, but PyTorch sees {counted(gpus, 'CUDA GPU')}; use "
            f"torchrun --nproc-per-node {gpus}, or --device cpu"
        )
    return torch.device("cuda", number)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _here() -> int:
    """Returns the number of ranks on this machine; without LOCAL_WORLD_SIZE, all may be here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(_world())))


@contextlib.contextmanager
def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the process group if torchrun started several processes.

    Args:
        device: The device of this process: NCCL between GPUs, gloo between CPUs.
        timeout: How long a rank waits for the others.

    Raises:
        TrainingError: The processes cannot connect.
    """
    if _world() == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of this run cannot connect to each other ({error})") from error
    yield Ranks(dist.get_rank(), dist.get_world_size(), _here())
    # Not after an error: the others may be in the middle of a collective, and an orderly leave would wait for them.
    dist.destroy_process_group()


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Turn errors of a collective about a lost rank into one line; other errors pass unchanged.

    Raises:
        TrainingError: Another rank ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistNetworkError | dist.DistStoreError) or PEER_LOST.search(str(error))):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            "another process of this run ended or did not answer; --resume continues the run, with any number of "
            f"processes ({said})"
        ) from error


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all ranks, in plain tensor operations; nn.SyncBatchNorm works on GPUs only."""

    ranks = Ranks()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalizes [N, C, H, W]; in evaluation mode, exactly ``nn.BatchNorm2d``."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x = input.float()
        count = self.ranks.size * x.numel() // x.shape[1]
        mean = self.ranks.sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = self.ranks.sum(centred.square().sum((0, 2, 3))) / count  # two passes avoid cancellation
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronized(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Make every BatchNorm of a model use statistics over all ranks, in place; names and values do not change."""
    if ranks.size == 1:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _synced(child, ranks, device))


def _synced(norm: nn.BatchNorm2d, ranks: Ranks, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        return converted
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    synced.ranks = ranks
    return synced


class _Sum(torch.autograd.Function):
    """All-reduce sum. In backward, gradients are summed, too, because each rank's result depends on all inputs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        with _collective():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        with _collective():
            dist.all_reduce(total)
        return total
