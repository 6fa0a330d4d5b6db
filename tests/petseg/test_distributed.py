"""Two processes with gloo on one CPU: they take the steps of a single one, and end together."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petseg import distributed
from petseg.checkpoint import load
from petseg.cli import run
from petseg.config import TrainConfig, from_dict, to_dict
from petseg.distributed import Ranks, SyncedBatchNorm, join, local_device, synchronized
from petseg.log import LOG
from petseg.run_state import BEST, LAST
from petseg.train import Trainer
from petseg.train_set import EpochSampler
from petseg_runtime.errors import EngineError, TrainingError
from tiny_runs import Recorder, at

CPU = torch.device("cpu")
#: Two levels: gloo needs a while for each BatchNorm.
SETTINGS = ["model.width=4", "model.levels=[1,2]", "data.val_fraction=0.1", "amp=fp32", "optimizer.lr=0.01"]
OPTIONS = ["--size", "32", "--batch", "4", "--epochs", "2", "--device", "cpu"]
OPTIONS += [word for setting in SETTINGS for word in ("--set", setting)]
#: A bias before a BatchNorm has no effect: its gradient is rounding noise, which Adam scales up; the mean follows it.
IDLE = tuple(f"{conv}.{name}" for conv in ("w_g", "w_x", "psi") for name in ("0.bias", "1.running_mean"))


def tiny(**more: Any) -> TrainConfig:
    raw: dict[str, Any] = {
        "epochs": 2,
        "batch": 4,
        "amp": "fp32",
        "model": {"width": 4, "levels": [1, 2]},
        "data": {"height": 32, "width": 32, "val_fraction": 0.1},
        "optimizer": {"lr": 1e-2},
    }
    return from_dict(TrainConfig, {**raw, **more})


@pytest.fixture(scope="module")
def whole(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Trainer(tiny(), oxford_root, folder, device=CPU).fit()
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_within_rounding(folder: Path, whole: Path) -> None:
    for name in (BEST, LAST):
        found, expected = load(folder / name).tensors, load(whole / name).tensors
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if not key.endswith(IDLE) and "optimizer" not in key:
                torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    for mine, other in zip(rows_of(folder), rows_of(whole), strict=True):
        assert float(mine["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
        assert float(mine["val_iou"]) == pytest.approx(float(other["val_iou"]), abs=2e-3)
        assert mine["step"] == other["step"]


def torchrun(root: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = ["-m", "petseg.cli", "train", "--data", str(root), "--output", str(out), *OPTIONS, "--json", *more]
    return subprocess.run(
        [*launch, *words], capture_output=True, text=True, check=False, timeout=280, env=environment()
    )


def test_torchrun_takes_the_steps_of_one_process_and_prints_once(
    oxford_root: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    done = torchrun(oxford_root, out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] == str(out / BEST)
    assert done.stderr.count("2 processes, 2 photos of each batch per process") == 1
    assert done.stderr.count("epoch 2/2") == 1
    assert {path.name for path in out.iterdir()} == {BEST, LAST, LOG, "run.json", "curves.png", "predictions.png"}
    record = json.loads((out / "run.json").read_text())
    assert record["processes"] == 2
    assert record["images_per_s"] > 0
    assert_same_within_rounding(out, whole)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # about forks beside CUDA's threads; they differ between versions
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two NVIDIA GPUs that PyTorch can use")
def test_two_gpus_take_the_steps_of_one(oxford_root: Path, tmp_path: Path) -> None:
    """With NCCL, and with PyTorch's BatchNorm over both."""
    Trainer(tiny(), oxford_root, tmp_path / "one", device=torch.device("cuda")).fit()
    done = torchrun(oxford_root, tmp_path / "two", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert_same_within_rounding(tmp_path / "two", tmp_path / "one")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


SCRIPT = """
import json, math, os, signal, sys, time, torch
from datetime import timedelta
from pathlib import Path
import petseg.data as data
import petseg.checkpoint as checkpoints
import petseg.train as training
from petseg.config import TrainConfig, from_dict
from petseg.distributed import join
from petseg.observers import Observer
from petseg.run_state import LAST
from petseg_runtime.errors import InputError, OutputError

config, root, out, best = {config!r}, Path({root!r}), Path({out!r}), Path({best!r})
torch.set_num_threads(1)
done = {{}}

class Acts(Observer):
    def __init__(self, at, act):
        self.at, self.act, self.steps = at, act, []
    def step(self, state, loss, lr):
        self.steps.append(state.step)
        if state.step == self.at:
            self.act()

def attempt(name, ranks, act, at=3, late=False, teacher=None, **more):
    observer, start = Acts(at, act), time.monotonic()
    try:
        trainer = training.Trainer(
            from_dict(TrainConfig, {{**config, **more}}), root, out / name, device=torch.device("cpu"),
            ranks=ranks, observer=observer, resume=(out / name / LAST).exists(), teacher=teacher,
        )
        trainer.late = late
        trainer.fit()
        end = "done"
    except BaseException as error:
        end = type(error).__name__ + ": " + str(error)
    done[name] = dict(end=end, steps=observer.steps, seconds=time.monotonic() - start)
    (out / f"{{name}}.{{os.environ['RANK']}}.json").write_text(json.dumps(done[name]))

def nothing(): pass

with join(torch.device("cpu"), timeout=timedelta(seconds=12)) as ranks:
    second = ranks.rank == 1
{body}
os._exit(0)  # the other process is gone: an orderly exit would wait for it
"""

IN_ORDER = """
    attempt("odd", ranks, nothing, batch=5)
    attempt("stopped", ranks, (lambda: signal.raise_signal(signal.SIGTERM)) if second else nothing)

    attempt("late", ranks, (lambda: signal.raise_signal(signal.SIGTERM)) if second else nothing, late=True)

    open_photo = data.images.open_photo
    def unlike(path, **options):
        if path.stem == "pet_07":
            raise InputError(f"{path}: cannot be read by this one")
        return open_photo(path, **options)
    data.images.open_photo = unlike if second else open_photo
    attempt("unlike", ranks, nothing, data={**config["data"], "on_bad": "skip"})
    data.images.open_photo = open_photo

    normalize = training.normalize
    def spoilt(image):
        return normalize(image) * math.nan
    def spoil():
        training.normalize = spoilt
    attempt("nan", ranks, spoil if second else nothing)
    training.normalize = normalize

    def full(*words):
        raise OutputError("the disk is full")
    write = checkpoints.save_checkpoint
    checkpoints.save_checkpoint = full
    attempt("full", ranks, nothing)
    checkpoints.save_checkpoint = write

    attempt("early", ranks, nothing, epochs=30, early_stop=1, optimizer=dict(lr=1e-9))
    attempt("resumed", ranks, nothing)
    attempt("taught", ranks, nothing, teacher=best, loss=dict(features=0.5))

    def hang():
        while not (out / "hangs.0.json").exists():
            time.sleep(0.1)
    attempt("hangs", ranks, hang if second else nothing)
"""

DIES = """
    attempt("dies", ranks, (lambda: os._exit(3)) if second else nothing)
"""


#: Runs scripts concurrently, each in a fork, because their imports take longer than their work.
FORKED = """
import json, os, sys
import petseg.train
children = []
for code, variables in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        os.environ.update(variables)
        exec(code, {"__name__": "__main__"})
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def two(body: str, root: Path, out: Path, teacher: Path, port: int) -> list[tuple[str, dict[str, str]]]:
    """The script of two processes that connect at a port, and the environment variables of each."""
    code = SCRIPT.format(config=to_dict(tiny()), root=str(root), out=str(out), best=str(teacher), body=body)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [(code, {"RANK": str(rank), "LOCAL_RANK": str(rank), **meet}) for rank in range(2)]


@pytest.fixture(scope="module")
def ends(oxford_root: Path, whole: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The outcome for both processes, one JSON file per process and failure. Each of its runs is for one test."""

    def make(out: Path) -> None:
        stop_after(oxford_root, out / "resumed", step=7)
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = [free.getsockname()[1] for free in (one, other)]  # held until both are known, so that they differ
        bodies = zip((IN_ORDER, DIES), ports, strict=True)
        scripts = json.dumps([s for body, port in bodies for s in two(body, oxford_root, out, whole / BEST, port)])
        command = [sys.executable, "-c", FORKED]
        done = subprocess.run(command, input=scripts, capture_output=True, text=True, timeout=280, env=environment())
        assert done.stdout == "[0, 0, 0, 3]\n", done.stderr

    return made_once("ends", make)


def stop_after(root: Path, out: Path, step: int) -> None:
    """Run one process, and stop it."""
    observer = Recorder(at_step=at(step, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(), root, out, device=CPU, observer=observer).fit()


def end_of(ends: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((ends / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def test_a_batch_that_cannot_be_shared_is_rejected(ends: Path) -> None:
    for one in end_of(ends, "odd"):
        assert one["end"] == "UsageError: batch is 5; it must be a multiple of the 2 processes that share it"


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_can_resume(
    ends: Path, oxford_root: Path, whole: Path
) -> None:
    first, second = end_of(ends, "stopped")
    assert first["end"] == second["end"] == "KeyboardInterrupt: "
    assert first["steps"] == second["steps"] == [1, 2, 3, 4]
    Trainer(tiny(), oxford_root, ends / "stopped", device=CPU, resume=True).fit()
    assert_same_within_rounding(ends / "stopped", whole)


def test_two_processes_that_read_their_losses_late_stop_after_the_same_step(
    ends: Path, oxford_root: Path, whole: Path
) -> None:
    first, second = end_of(ends, "late")
    assert first["end"] == second["end"] == "KeyboardInterrupt: "
    # Signalled at step 3, when 4 is issued; 5 carries the request and is read after the epoch's last step, 5.
    assert first["steps"] == second["steps"] == [1, 2, 3, 4, 5]
    assert load(ends / "late" / LAST).meta["state"]["step"] == 5
    Trainer(tiny(), oxford_root, ends / "late", device=CPU, resume=True).fit()
    assert_same_within_rounding(ends / "late", whole)


def test_processes_with_different_photos_do_not_start(ends: Path) -> None:
    for one, bad in zip(end_of(ends, "unlike"), ("0 could read all that it found", "1 excluded pet_07"), strict=True):
        assert one["end"].startswith("TrainingError: the processes of this run have different photos")
        assert f"rank {bad} (`petseg data check`" in one["end"]
        assert one["steps"] == []


def test_a_run_of_one_process_can_be_resumed_with_two(ends: Path, whole: Path) -> None:
    assert [one["end"] for one in end_of(ends, "resumed")] == ["done", "done"]
    assert [one["steps"] for one in end_of(ends, "resumed")] == [[8, 9, 10]] * 2
    assert_same_within_rounding(ends / "resumed", whole)


def test_two_processes_learn_the_features_of_a_teacher_as_one_does(
    ends: Path, oxford_root: Path, tmp_path: Path, whole: Path
) -> None:
    assert [one["end"] for one in end_of(ends, "taught")] == ["done", "done"]
    config = tiny(loss={"features": 0.5})
    Trainer(config, oxford_root, tmp_path, device=CPU, teacher=whole / BEST).fit()
    assert_same_within_rounding(ends / "taught", tmp_path)


def test_a_nan_in_the_part_of_one_process_stops_both_and_names_the_whole_batch(ends: Path) -> None:
    first, second = end_of(ends, "nan")
    assert first["end"] == second["end"]
    assert first["end"].startswith("NonFiniteLoss: loss nan")
    assert first["end"].count("pet_") == 4


def test_an_error_of_the_first_process_ends_the_other(ends: Path) -> None:
    first, second = end_of(ends, "full")
    assert first["end"] == "OutputError: the disk is full"
    assert second["end"] == "FirstRankFailed: rank 0 of this run failed; see its message"


def test_both_stop_early_together(ends: Path) -> None:
    first, second = end_of(ends, "early")
    assert (first["end"], first["steps"]) == ("done", second["steps"])
    assert len(first["steps"]) < 30


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_is_gone_ends_the_other_in_time(ends: Path, how: str) -> None:
    first = json.loads((ends / f"{how}.0.json").read_text())
    assert first["end"].startswith("TrainingError: another process of this run ended or did not answer; --resume")
    assert first["seconds"] < 60, "not the half hour that PyTorch would wait"


# simulated in one process


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(CPU) as ranks:
        assert ranks == Ranks()
    assert ranks.first
    assert ranks.on_first(lambda: 0.5, CPU) == 0.5
    model = nn.Conv2d(1, 1, 1)
    assert ranks.wrap(model, CPU) is model


def test_processes_that_cannot_connect_say_so(
    monkeypatch: pytest.MonkeyPatch, oxford_root: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TrainingError, match="cannot connect to each other"), join(CPU):
        pass
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), *OPTIONS, "-q"]
    assert run(args) == 9


@pytest.mark.parametrize("more", [["--data", "/nowhere"], ["--batch", "x"]])
def test_an_error_begins_with_the_rank_of_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str]
) -> None:
    args = ["train", "--output", str(tmp_path / "run"), "--device", "cpu", *more]
    for world, rank in (("1", ""), ("2", "rank 1: ")):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(distributed, "join", lambda device: contextlib.nullcontext(Ranks(1, 2, 2)))
        assert run(args) in (2, 8)
        *usage, message = capsys.readouterr().err.splitlines()
        assert message.startswith((f"petseg: {rank}/nowhere", f"Error: {rank}Invalid value for '--batch'"))
        assert any("Usage: petseg train" in line for line in usage) == ("--batch" in more)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_device("cuda") == torch.device("cuda:0"), "one on each of two machines"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert local_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("cuda") == torch.device("cuda:1")
    assert local_device("cpu") == CPU
    with pytest.raises(EngineError, match="--device cuda:0 is one GPU, but there are several processes"):
        local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = "^there are 3 processes on this machine, but PyTorch sees 2 CUDA GPUs; use torchrun --nproc-per-node 2, or"
    for name in ("cuda", "auto"):  # without --device, too
        with pytest.raises(EngineError, match=said):
            local_device(name)


GLOO_GONE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"
NCCL_GONE = (
    "NCCL error in: X.cpp:1, remote process exited\nncclRemoteError: A call failed possibly due to a remote process"
)
HERE = (
    RuntimeError("cuDNN error: timed out"),
    RuntimeError("NCCL error: unhandled cuda error"),
    RuntimeError("gloo is not built in"),
    torch.distributed.DistBackendError(
        "ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device"
    ),
    torch.distributed.DistBackendError("ncclSystemError: Bootstrap : no socket interface found"),
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO_GONE),
        torch.distributed.DistBackendError(NCCL_GONE),
        torch.distributed.DistStoreError("wait timeout after 12000ms"),
    ],
)
def test_a_collective_with_a_lost_process_says_so_and_keeps_the_message(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(tensor: torch.Tensor, *words: Any) -> None:
        raise error

    ranks, first = Ranks(0, 2, 2), str(error).splitlines()[0]
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed.dist, name, fails)
    x = torch.ones(2, requires_grad=True)
    for act in (
        lambda: ranks.sum(x),
        lambda: ranks.same("00", CPU),
        lambda: ranks.on_first(lambda: 0.5, CPU),
        lambda: Ranks(1, 2, 2).on_first(lambda: 0.5, CPU),
    ):
        with pytest.raises(TrainingError, match="another process of this run ended") as caught:
            act()
        assert str(caught.value).endswith(f"({first})")
    with pytest.raises(TrainingError, match="--resume"), ranks.communicating():
        raise error
    with pytest.raises(type(error)), Ranks().communicating():
        raise error


@pytest.mark.parametrize("error", HERE, ids=str)
def test_an_error_of_this_process_is_not_blamed_on_another(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(tensor: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(distributed.dist, "all_reduce", fails)
    with pytest.raises(type(error)) as caught:
        Ranks(0, 2, 2).sum(torch.ones(2))
    assert caught.value is error
    with pytest.raises(type(error)), Ranks(0, 2, 2).communicating():
        raise error


def test_an_error_outside_of_a_collective_passes_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *words, **options: None)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="gloo") as caught, join(CPU):
        raise RuntimeError(GLOO_GONE)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_the_processes_are_the_batches_of_one(ranks: int) -> None:
    whole = EpochSampler(22, 4, seed=7)
    parts = [EpochSampler(22, 4, 7, rank, ranks) for rank in range(ranks)]
    for epoch, start_at in ((0, 0), (3, 2)):
        for sampler in (whole, *parts):
            sampler.epoch, sampler.start = epoch, start_at
        assert {len(sampler) for sampler in parts} == {5}
        for number, (batch, *shares) in enumerate(zip(whole, *parts, strict=True), start=start_at):
            assert sorted(draw for share in shares for draw in share) == sorted(batch)
            assert {len(share) for share in shares} == {4 // ranks}
            assert [draw - epoch * 22 for draw in batch] == parts[-1].photos(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_batch_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    nn.init.uniform_(model[0].weight)
    ours = nn.Sequential(SyncedBatchNorm(3), nn.Sequential(SyncedBatchNorm(3)))
    ours.load_state_dict(model.state_dict())
    image = (5 + torch.randn(4, 3, 8, 8)).to(dtype)
    results = []
    for network in (model, ours):
        given = image.clone().requires_grad_()
        answer = network(given)
        (answer.float() * torch.linspace(0, 1, 8)).sum().backward()
        still = network.eval()(image)
        results.append((answer, given.grad, still, network[0].weight.grad, dict(network.state_dict())))
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(results[1], results[0], **near)


def test_a_gpu_takes_torchs_own_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names = list(model.state_dict())
    synchronized(model, Ranks(), torch.device("cuda"))
    assert type(model[1]) is nn.BatchNorm2d
    synchronized(model, Ranks(0, 2), torch.device("cuda"))
    assert type(model[1]) is nn.SyncBatchNorm
    assert list(model.state_dict()) == names
