"""A lease leaves the rounded weights in pieces, and the metrics of that very file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import lease, photos
from benchmarks.lease import Job
from petseg import checkpoint, cli
from petseg.data import Split, find, read_pair, resize_trimap
from petseg.evaluate import evaluate, open_model
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.reference import torch_run
from petseg.schedule import learning_rate
from petseg_runtime.errors import DataError, OutputError

#: width 4, as fast as possible
SMALL = ["model.width=4", "batch=4", "amp=fp32", "data.val_fraction=0.25", "data.split_seed=3", "data.workers=0"]
SET = [word for setting in SMALL for word in ("--set", setting)]
KINDS = ("background", "pet", "ignored")


@pytest.fixture(scope="module")
def data(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set under two names."""
    folder = tmp_path_factory.mktemp("data")
    for name in (photos.COPIES, photos.NATIVE):
        (folder / name).symlink_to(oxford_root)
    return folder


@pytest.fixture
def train_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `petseg train` in this process, which has already imported PyTorch; only `out` uses a separate one."""

    def train(job: Job, run: Path, seconds: float, keep: object) -> int:
        _, _, program, *words = job.words(run)
        assert program == "petseg.cli"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["petseg", *words])
            return cli.run(words)

    monkeypatch.setattr(lease, "train", train)


def leased(data: Path, out: Path, *words: str) -> dict[str, Any]:
    """Run a lease at 32 x 32, and return its record."""
    options = ["published", "--data", str(data), "--out", str(out), "--size", "32", "--device", "cpu", *SET, *words]
    with pytest.raises(SystemExit) as ended:
        lease.lease(options, standalone_mode=False)
    assert ended.value.code == 0
    return dict(json.loads((out / "published.json").read_text()))


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a complete lease, in pieces of 100 kB."""
    folder = tmp_path_factory.mktemp("lease") / "out"
    teacher = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    spec = {"height": 32, "width": 32, "threshold": 0.5, "cutout_threshold": 0.1}
    meta = {"kind": "model", "model": {"width": 2}, "spec": spec}
    checkpoint.save_checkpoint(teacher, AttentionUNet(AttentionUNetConfig(width=2)).state_dict(), meta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "PIECE", 100_000)
        leased(data, folder, "--epochs", "2", "--teacher", str(teacher), "--commit", "abc")
    return folder


@pytest.fixture(scope="module")
def weights(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights, joined by `python -m benchmarks.lease join` in this process."""
    path = tmp_path_factory.mktemp("joined") / "published.safetensors"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["lease", "join", str(out / "published.manifest.json"), str(path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(lease.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said.getvalue()
    return path


def test_the_output_of_a_lease_is_small_and_complete(out: Path, weights: Path) -> None:
    manifest = json.loads((out / "published.manifest.json").read_text())
    names = [row["file"] for row in manifest["pieces"]]
    assert {path.name for path in out.iterdir()} == {"published.json", "published.manifest.json", *names}
    assert len(names) > 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert [(out / name).stat().st_size for name in names[:-1]] == [100_000] * (len(names) - 1)
    assert 0 < (out / names[-1]).stat().st_size <= 100_000
    assert manifest["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert lease.PIECE < 16 * 2**20
    record = json.loads((out / "published.json").read_text())
    assert record["weights"] == manifest
    assert record["model"]["identity"] == manifest["sha256"]


def test_the_record_states_what_was_run(out: Path) -> None:
    record = json.loads((out / "published.json").read_text())
    (run,) = record["runs"]
    config = run["config"]
    assert (config["epochs"], config["model"]["width"], config["data"]["height"], config["data"]["width"]) == (
        2,
        4,
        32,
        32,
    )
    assert (run["epochs"], run["data"]["val_photos"], run["teacher"]["file"]) == (2, 6, "teacher.safetensors")
    assert "--recipe published" in run["command"]
    assert (record["commit"], run["commit"], record["exit_code"], record["plan"]) == ("abc", "abc", 0, None)
    said = (
        "python -m benchmarks.lease published --data DATA --out OUT --size 32 --epochs 2 --teacher teacher.safetensors"
    )
    assert record["command"] == f"{said} {' '.join(SET)}"
    assert record["seconds"] > run["elapsed"] > run["seconds"] > 0
    assert {"images_per_s", "data_wait", "peak_gpu_memory_bytes", "validation_reached_published", "versions"} <= set(
        run
    )
    assert {"machine", "versions", "uncommitted", "shipped_model"} <= set(record)


def test_the_metrics_are_measured_on_the_rounded_weights(out: Path, weights: Path, data: Path) -> None:
    record = json.loads((out / "published.json").read_text())
    assert list(record["tests"]) == [photos.TEST_SETS[photos.COPIES], photos.TEST_SETS[photos.NATIVE]]
    with open_model(weights, "cpu") as model:
        result = evaluate(model.run, find(data / photos.NATIVE, Split.TEST), 32, 32)
        val = evaluate(model.run, find(data / photos.COPIES, Split.VAL, val_fraction=0.25, seed=3), 32, 32)
    found = record["tests"][photos.TEST_SETS[photos.NATIVE]]
    at_validation = found.pop("at_thresholds_of_validation")
    assert found == result.summary(model.threshold)
    assert set(found["readings"]) == set(at_validation) == set(KINDS)
    for border in KINDS:
        cut = record["thresholds"][border]
        assert at_validation[border] == result.summary(cut)["readings"][border]
        ious = [val.summary(k / 255)["readings"][border]["iou"] for k in range(1, 255)]
        assert val.summary(cut)["readings"][border]["iou"] == max(ious)
    assert record["validation"] == val.summary(model.threshold)
    assert record["photos_failed"] == []


@pytest.mark.usefixtures("train_in_process")
def test_the_test_split_can_be_evaluated_at_home(
    out: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the training photos are sent, and smaller ones; the result is complete after measuring at home."""
    lease.send([str(data), str(tmp_path / "sent"), "--size", "24x40"], standalone_mode=False)
    assert re.search(r"oxford-iiit-pet-128: 49 files, 0\.\d MiB", capsys.readouterr().out)
    sent = find(tmp_path / "sent" / photos.COPIES, Split.TRAINVAL)
    for pair, whole in zip(sent, find(data / photos.COPIES, Split.TRAINVAL), strict=True):
        (photo, trimap), (before, truth) = read_pair(pair), read_pair(whole)
        small = before.shape[0] <= 24 and before.shape[1] <= 40
        expected = truth if small else resize_trimap(truth, 24, 40)
        assert photo.shape[:2] == trimap.shape == expected.shape
        assert np.array_equal(trimap, expected)
    with pytest.raises(DataError, match=r"test\.txt"):
        find(tmp_path / "sent" / photos.COPIES, Split.TEST)

    record = leased(tmp_path / "sent", tmp_path / "out", "--epochs", "2", "--no-tests")
    assert (record["tests"], record["photos_failed"]) == ({}, [])
    assert "--no-tests" in record["command"]
    joined = tmp_path / "joined.safetensors"
    lease.join([str(tmp_path / "out" / "published.manifest.json"), str(joined)], standalone_mode=False)
    words = [str(tmp_path / "out" / "published.json"), str(joined), "--data", str(data), "--device", "cpu"]
    lease.measure(words, standalone_mode=False)
    completed = json.loads((tmp_path / "out" / "published.json").read_text())
    with open_model(joined, "cpu") as model:
        result = evaluate(model.run, find(data / photos.NATIVE, Split.TEST), 32, 32)
        expected = result.summary(model.threshold)
    found = completed["tests"][photos.TEST_SETS[photos.NATIVE]]
    assert found == found | expected
    words[1] = str(out / "published.safetensors.00")
    with pytest.raises(SystemExit, match=r"not the file that published\.json describes"):
        lease.measure(words, standalone_mode=False)


def test_only_kernels_are_rounded(weights: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(weights)
    assert {t.dtype for t in loaded.tensors.values() if t.ndim > 1} == {torch.float16}
    assert {t.dtype for t in loaded.tensors.values() if t.ndim == 1} == {torch.float32}
    assert loaded.meta["provenance"]["commit"] == "abc"
    assert loaded.meta["rounded"]["kernels"] == "float16"

    torch.manual_seed(0)
    network = AttentionUNet(AttentionUNetConfig(width=2))
    state = network.state_dict()
    state["head.weight"] = state["head.weight"] + 1e6  # larger than a kernel ever is
    statistics = [name for name in state if name.endswith("running_var")]
    for name in statistics:
        state[name] = torch.full_like(state[name], 1e-9)
    spec = {"height": 32, "width": 32, "threshold": 0.5, "cutout_threshold": 0.1}
    meta = {"kind": "model", "model": {"width": 2}, "spec": spec, "provenance": {}}
    checkpoint.save_checkpoint(tmp_path / "best.safetensors", state, meta)
    lease.rounded(tmp_path / "best.safetensors", tmp_path / "half.safetensors")
    model, loaded = checkpoint.load_model(tmp_path / "half.safetensors")
    assert loaded.meta["rounded"]["from_sha256"] == checkpoint.load(tmp_path / "best.safetensors").sha256
    got = model.state_dict()
    for name, tensor in state.items():
        whole = tensor.ndim <= 1 or name == "head.weight"
        assert torch.equal(got[name], tensor if whole else tensor.half().float()), name
    expected = AttentionUNet(AttentionUNetConfig(width=2))
    expected.load_state_dict(got)
    batch = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with open_model(tmp_path / "half.safetensors", "cpu") as opened:
        assert np.array_equal(opened.run(batch), torch_run(expected)(batch))


def test_pieces_are_replaced_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk, a lease leaves the earlier pieces."""
    out, weights, write = tmp_path / "out", tmp_path / "w.safetensors", lease.write_atomic
    out.mkdir()
    monkeypatch.setattr(lease, "PIECE", 4)
    for content in (b"the first", b"a longer second"):
        weights.write_bytes(content)
        lease.pack(weights, out)
        lease.join([str(out / "w.manifest.json"), str(tmp_path / "joined")], standalone_mode=False)
        assert (tmp_path / "joined").read_bytes() == content
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, data: bytes) -> None:
        if path.name == "w.safetensors.02":
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(lease, "write_atomic", full)
    weights.write_bytes(b"the third one")
    with pytest.raises(OSError, match="No space"):
        lease.pack(weights, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("spoil", ["change", "cut", "swap"])
def test_corrupted_pieces_are_not_joined(out: Path, tmp_path: Path, spoil: str) -> None:
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second = (tmp_path / f"published.safetensors.0{i}" for i in (0, 1))
    data = first.read_bytes()
    if spoil == "swap":
        manifest = json.loads((tmp_path / "published.manifest.json").read_text())
        manifest["pieces"][:2] = manifest["pieces"][1::-1]
        (tmp_path / "published.manifest.json").write_text(json.dumps(manifest))
    else:
        second.write_bytes(data if spoil == "change" else second.read_bytes()[:-1])
    name = "published.safetensors: not" if spoil == "swap" else "published.safetensors.01: not"
    with pytest.raises(SystemExit, match=name):
        lease.join([str(tmp_path / "published.manifest.json"), str(tmp_path / "joined")], standalone_mode=False)
    assert not (tmp_path / "joined").exists()


# --------------------------------------------------------------------------------------------------- the time limit


def job(data: Path, *settings: str) -> Job:
    return Job("published", data / photos.COPIES, "cpu", (*SMALL, "data.height=32", "data.width=32", *settings), {})


def test_the_number_of_epochs_fits_the_given_minutes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"read_a_photo": 0.5, "first_epoch_more": 3, "epoch_start": 1, "step": 2, "validate_and_save": 4}
    saved = {"save": 2.0}
    monkeypatch.setattr(lease, "warmed_up", lambda *_: {**costs, **saved, "measure_a_photo": 0.25})
    monkeypatch.setattr(lease, "QUICK_SAVE", 3.0)
    monkeypatch.setattr(lease.time, "perf_counter", lambda: 107.0)
    tests = {"a": find(data / photos.COPIES, Split.TEST), "b": []}
    # 18 photos to train on are 4 steps of 4; before: START + 24 / 2 + 3; after: (6 of val + 6 of test) / 4
    one, rest = 1 + 4 * 2 + 4, lease.START + 15 + 3 + lease.FINISH + 2
    for epochs, left in ((1, rest + 1.01 * one), (5, rest + 5.9 * one), (7, 1e6)):
        seconds = (left + 7) / (1 - lease.MARGIN)  # seven seconds have passed
        plan = lease.planned(job(data, "epochs=7"), tmp_path, tests, seconds, 100)
        assert plan["epochs"] == epochs
        assert plan["deadline"] == pytest.approx(seconds * (1 - lease.MARGIN / 2) - 3)
    with pytest.raises(SystemExit, match=r"no epoch fits .* an epoch takes 13\.0 s"):
        lease.planned(job(data), tmp_path, tests, (rest + 0.99 * one + 7) / (1 - lease.MARGIN), 100)
    saved["save"] = 4.0  # no longer quick: it lengthens the run by a tenth
    seconds = (rest + 2 + 5.9 * one + 7) / (1 - lease.MARGIN)
    assert lease.planned(job(data, "epochs=7"), tmp_path, tests, seconds, 100)["epochs"] == 5
    assert lease.planned(job(data, "epochs=7"), tmp_path, tests, seconds, 100)["epoch"] == pytest.approx(1.1 * one)


def test_the_warm_up_measures_the_cost_of_each_part(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STEPS", 1)
    short = job(data, "augment.mix_until=0.5")
    costs = lease.warmed_up(short, short.config(), tmp_path, 18, 6)
    assert all(value >= 0 for value in costs.values())
    assert min(costs[name] for name in ("read_a_photo", "step", "validate_and_save", "measure_a_photo")) > 0
    meta = checkpoint.load(tmp_path / "warm-up" / "best.safetensors").meta
    seen, augment = meta["data"], meta["config"]["augment"]
    assert (seen["train_photos"], seen["val_photos"]) == (12, 6), "as many validation photos as in the run"
    assert augment["mix_until"] == 1.0, "the timed epoch mixes photos"


def test_the_second_half_of_an_epoch_is_timed() -> None:
    clock = lease.Clock()
    for seconds in ((9.0, 18.0), (5.0, 6.0, 7.0, 8.0)):
        state = lease.RunState()
        for mark in seconds:
            state.steps_summed, state.seconds = state.steps_summed + 1, mark
            clock.step(state, 0.0, 0.0)
    assert clock.marks == [0.0, 5.0, 6.0, 7.0, 8.0]


def test_a_shortened_run_ends_at_a_low_learning_rate(data: Path) -> None:
    config = job(data, "epochs=30").config()
    assert lease.shortened(config, 30) == ["epochs=30"]
    short = job(data, *lease.shortened(config, 25)).config()
    assert (short.epochs, short.schedule.restart_epochs) == (25, 25)
    assert learning_rate(short.schedule, 1.0, 25 * 9 - 1, 9, 25) < 0.01
    other = job(data, "epochs=30", "schedule.name=cosine").config()
    assert lease.shortened(other, 25) == ["epochs=25"]


@pytest.mark.usefixtures("train_in_process")
def test_a_lease_with_a_time_limit_replans_its_epochs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[dict[str, Any]] = []
    planned = lease.planned

    def one_less(*args: Any) -> dict[str, Any]:
        plans.append(planned(*args))
        return {**plans[0], "epochs": plans[0]["epochs"] - 1}

    monkeypatch.setattr(lease, "planned", one_less)
    record = leased(data, tmp_path, "--epochs", "2", "--minutes", "5")
    (run,) = record["runs"]
    assert plans[0]["epochs"] == 2
    assert record["plan"]["epochs"] == run["epochs"] == run["config"]["epochs"] == 1
    assert record["command"].count("--minutes 5.0") == 1


def test_an_overlong_run_is_stopped_and_its_best_checkpoint_used(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, kept = tmp_path / "run" / "best.safetensors", []

    class Popen(subprocess.Popen[bytes]):
        """Its first wait ends with the first checkpoint, however long that takes."""

        def wait(self, timeout: float | None = None) -> int:
            while not best.exists():
                assert self.poll() is None
                time.sleep(0.05)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    endless = job(data, "epochs=100000")
    assert lease.train(endless, tmp_path / "run", 1.5, lambda path: kept.append(checkpoint.load(path).meta)) == 130
    (told,) = lease.trained([tmp_path / "run"])
    assert 1 <= told["epochs"] < 100_000
    assert kept[0]["spec"]["height"] == 32


def test_a_run_that_fails_before_its_first_checkpoint_ends_the_lease(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "words", lambda *_: ["sh", "-c", "exit 4"])
    with pytest.raises(SystemExit, match="ended with exit code 4 and left no checkpoint"):
        lease.train(job(data), tmp_path / "run", math.inf, print)


def test_better_checkpoints_are_saved_during_a_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a lease that is cut off leaves the best. The run is a shell script that ignores the interrupt."""
    run = tmp_path / "run"
    run.mkdir()
    better = "echo $i > new; mv new best.safetensors; until [ -e seen$i ]; do sleep 0.05; done"
    script = f"trap : INT; cd {run}; for i in 1 2 3; do {better}; done; while :; do sleep 0.1; done"
    kept: list[str] = []

    def keep(path: Path) -> None:
        kept.append(path.read_text().strip())
        (run / f"seen{kept[-1]}").touch()
        if len(kept) < 3:  # temporary errors: the run goes on
            raise (OSError(28, "No space left on device"), OutputError("no space"))[len(kept) - 1]

    monkeypatch.setattr(Job, "words", lambda *_: ["bash", "-c", script])
    # The time is up once the third one is kept.
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: 1000.0 * (len(kept) == 3)))
    monkeypatch.setattr(lease, "LOOK", 0.1)
    monkeypatch.setattr(lease, "STOPPING", 0.3)
    assert lease.train(job(data), run, 500, keep) == -9
    assert kept == ["1", "2", "3"]


def test_missing_requirements_are_found_before_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "train", lambda *_: pytest.fail("trained for nothing"))
    (tmp_path / photos.COPIES / "annotations" / "trimaps").mkdir(parents=True)
    (tmp_path / photos.COPIES / "images").mkdir()
    with pytest.raises(DataError, match=r"test\.txt"):
        lease.lease(["published", "--data", str(tmp_path), "--out", str(tmp_path)], standalone_mode=False)
