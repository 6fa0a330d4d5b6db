"""Several processes, one run: what ``torchrun --nproc-per-node N -m petseg.cli train ...`` needs.

Each process (a rank) computes on its own device with its own part of every batch, so that N processes take the steps
of one, up to rounding: BatchNorm's statistics and the sums of the Dice loss are over the whole batch, and gradients are
averaged by DistributedDataParallel. Each holds all photos and asks the teacher itself.

Built and tested on the CPU with gloo and two processes; never run on several GPUs by us.
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
from petseg_runtime.errors import EngineError, TrainingError

__all__ = ["Ranks", "SyncedBatchNorm", "join", "local_device", "synchronized"]

#: How long a process waits for the others. The first one validates alone meanwhile, so it is not short.
TIMEOUT: Final = timedelta(minutes=30)
#: How gloo and NCCL say that another process is gone; such errors have no class of their own. What is wrong with this
#: process or machine, as no network interface or one GPU for two processes, is said in other words.
GONE: Final = re.compile(
    r"gloo/transport/\w+/(pair|buffer|unbound_buffer)\.|pair closure|Connection (closed|reset) by peer"
    r"|ncclRemoteError|NCCL communicator was aborted|NCCL operations have failed or timed out"
    r"|collective operation timeout"
)


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many. The default is the only one, and then nothing here communicates."""

    rank: int = 0
    size: int = 1
    #: How many of them share this machine's cores and memory.
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, of the same shape; gradients flow back to each of them."""
        return tensor if self.size == 1 else _Sum.apply(tensor)

    def same(self, digest: str, device: torch.device) -> bool:
        """Whether all processes give the same digest, in hexadecimal digits and of one length; all of them learn it."""
        if self.size == 1:
            return True
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(all_, mine)
        return all(torch.equal(one, mine) for one in all_)

    def on_first(self, action: Callable[[], float], device: torch.device) -> float:
        """What ``action`` gives in the first process, in all of them; they wait for it.

        Raises:
            TrainingError: It failed there. (There, its own error is raised.)
        """
        if self.size == 1:
            return action()
        answer = torch.zeros(2, dtype=torch.float64, device=device)  # done or not, value
        if not self.first:
            with _exchange():
                dist.broadcast(answer, 0)
            done, value = answer.tolist()
            if not done:
                raise TrainingError("the first process of this run could not go on; it says why")
            return float(value)
        try:
            answer[1] = action()
            answer[0] = 1
        finally:
            with _exchange():
                dist.broadcast(answer, 0)
        return float(answer[1])

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network as it is called in training; its weights and their names stay those of ``model``."""
        if self.size == 1:
            return model
        with _exchange():
            return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def exchanging(self) -> AbstractContextManager[None]:
        """Around calls of a wrapped network, forwards and backwards, in which PyTorch itself exchanges.

        Raises:
            TrainingError: Another process ended, or did not answer in time.
        """
        return _exchange() if self.size > 1 else contextlib.nullcontext()


def local_device(name: str) -> torch.device:
    """The device of this process: ``cuda`` is the GPU of its number on this machine.

    Raises:
        EngineError: It is not there, or one GPU was named for several processes.
    """
    device = pick_device(name)
    if device.type == "cpu" or _world() == 1:
        return device
    if device.index is None:  # what comes next wants a number, also where a machine has one process only
        return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if _here() > 1:
        raise EngineError(f"--device {name} is one GPU, but there are several processes: use --device cuda")
    return device


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _here() -> int:
    """Processes of the run on this machine; where whoever started them does not say, all of them may be."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(_world())))


@contextlib.contextmanager
def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Meet the processes that torchrun started, if it did.

    Args:
        device: Of this process: NCCL between GPUs, gloo between CPUs.
        timeout: After which a process that waits for the others gives up.

    Raises:
        TrainingError: They do not find each other.
    """
    if _world() == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of this run do not find each other ({error})") from error
    yield Ranks(dist.get_rank(), dist.get_world_size(), _here())
    # After an error the others may be in the middle of an exchange, and leaving in order would wait for them.
    dist.destroy_process_group()


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turns the error of an exchange with a process that is gone into one line; others are left as they are.

    Raises:
        TrainingError: Another process ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistNetworkError | dist.DistStoreError) or GONE.search(str(error))):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            "another process of this run ended or did not answer; --resume goes on, with any number of processes "
            f"({said})"
        ) from error


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, in plain tensor arithmetic: torch's own works on GPUs only."""

    ranks = Ranks()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """[N, C, H, W] to the same; in evaluation, exactly ``nn.BatchNorm2d``."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x = input.float()
        count = self.ranks.size * x.numel() // x.shape[1]
        mean = self.ranks.sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = self.ranks.sum(centred.square().sum((0, 2, 3))) / count  # in two passes: no cancellation
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronized(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Make every BatchNorm of a model take its statistics over all processes, in place; names and values stay."""
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
    """Sum over processes. Backwards, the gradients are summed too: what each computed depends on what all put in."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        with _exchange():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        with _exchange():
            dist.all_reduce(total)
        return total
