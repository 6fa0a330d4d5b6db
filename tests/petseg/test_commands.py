"""`petseg train`, `evaluate` and `data check` as users and scripts call them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from command_line import contents, failed
from petseg import checkpoint as checkpoints
from petseg import record as records
from petseg import train as training
from petseg.cli import run
from petseg.config import TrainConfig, to_dict
from petseg.data import Split, find
from petseg.distributed import Ranks
from petseg.evaluate import as_shown, evaluate, open_model
from petseg.lock import LOCK, lock_folder
from petseg.model import AttentionUNetConfig
from petseg_export import OnnxConfig, export
from petseg_runtime.errors import FirstRankFailed, NonFiniteLoss, OutputError

SMALL = ["--width", "2", "--size", "32", "--batch", "4", "--device", "cpu", "--set", "amp=fp32"]
#: The cache folder of each test is empty, and matplotlib would take seconds to fill it.
FONTS = matplotlib.get_cachedir()
FILES = {"best.safetensors", "last.safetensors", "log.csv", "run.json", "curves.png", "predictions.png"}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what the command printed."""

    folder: Path
    printed: dict[str, Any]
    err: str


@pytest.fixture(scope="module")
def trained(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of a tiny network. Read only."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        args = ["train", "--data", str(oxford_root), "--output", str(folder), *SMALL, "--epochs", "2", "--json"]
        assert run(args) == 0
    return Run(folder, json.loads(out.getvalue()), err.getvalue())


@pytest.fixture
def trained_copy(trained: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------ train


def test_training_leaves_its_files_and_no_others(trained: Run) -> None:
    assert {path.name for path in trained.folder.iterdir()} == FILES
    for name in ("curves.png", "predictions.png"):
        with Image.open(trained.folder / name) as image:
            image.load()
            assert min(image.size) > 200
    assert [row["epoch"] for row in log_of(trained.folder)] == ["1", "2"]


def test_json_names_the_checkpoint_and_its_epoch(trained: Run) -> None:
    assert trained.printed["schema_version"] == 1
    assert trained.printed["checkpoint"] == str(trained.folder / "best.safetensors")
    rows = log_of(trained.folder)
    best = max(rows, key=lambda row: float(row["val_iou"]))
    assert {name: float(value) for name, value in best.items()} == trained.printed["best"]


def test_progress_goes_to_stderr(trained: Run, oxford_root: Path) -> None:
    for words in ("attention U-Net, width 2", "float32", "epoch 1/2", "epoch 2/2", "val IoU"):
        assert words in trained.err


def test_the_options_reach_the_run(trained: Run) -> None:
    meta = checkpoints.load(trained.folder / "best.safetensors").meta
    config = meta["config"]
    assert (config["epochs"], config["batch"], config["amp"]) == (2, 4, "fp32")
    assert meta["model"] == to_dict(TrainConfig(model=AttentionUNetConfig(width=2)))["model"]
    assert (meta["spec"]["height"], meta["spec"]["width"]) == (32, 32)
    assert meta["precision"] == "float32"


def test_a_signal_while_the_folder_is_locked_leaves_no_lock_file(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(folder: Path) -> Callable[[], None]:
        unlock = lock_folder(folder)
        signal.raise_signal(signal.SIGTERM)
        return unlock

    monkeypatch.setattr(training, "lock_folder", locked)
    monkeypatch.setattr(training, "remove_unfinished", lambda folder: time.sleep(60))  # it comes next
    with pytest.raises(SystemExit) as end:
        run(["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), *SMALL])
    assert end.value.code == 143
    del end  # its traceback keeps the trainer alive
    gc.collect()
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumed_says_the_same_again(
    trained: Run, trained_copy: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(trained_copy)
    args = ["train", "--data", str(oxford_root), "--output", str(trained_copy), *SMALL, "--epochs", "2", "--resume"]
    assert run(args) == 0
    after = contents(trained_copy)
    for name in ("best.safetensors", "last.safetensors", "log.csv"):
        assert after[name] == before[name]
    assert set(after) == FILES
    first, second = capsys.readouterr().out.splitlines()
    best = trained.printed["best"]
    threshold = f"{best['val_threshold']:.2f}"
    assert (
        first == f"{trained_copy / 'best.safetensors'}: validation IoU {best['val_iou']:.4f} at threshold {threshold}"
    )
    assert second.startswith(str(trained_copy / "log.csv"))


def test_a_second_run_in_the_same_folder_is_rejected(
    trained_copy: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(trained_copy)
    code, message = failed(["train", "--data", str(oxford_root), "--output", str(trained_copy), *SMALL], capsys)
    assert code == 9
    assert "--resume" in message
    assert contents(trained_copy) == before


def test_other_settings_are_not_resumed(
    trained_copy: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(trained_copy), *SMALL, "--epochs", "2", "--resume"]
    code, message = failed([*args, "-q", "--set", "optimizer.lr=0.5"], capsys)
    assert code == 9
    assert "optimizer.lr was 0.001, now 0.5" in message


def test_a_picture_that_cannot_be_written_is_named_and_the_run_is_done(
    trained_copy: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained_copy / "curves.png").unlink()
    (trained_copy / "curves.png").mkdir()
    (trained_copy / "run.json").unlink()
    args = ["train", "--data", str(oxford_root), "--output", str(trained_copy), *SMALL, "--epochs", "2", "--resume"]
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert f"petseg: {trained_copy / 'curves.png'}: cannot be written (Is a directory)" in err
    assert out.splitlines()[-1] == f"{trained_copy / 'log.csv'}; beside it run.json, predictions.png"
    assert json.loads((trained_copy / "run.json").read_text())["epochs"] == 2


def test_a_photo_that_became_unreadable_costs_a_picture_and_not_the_run(
    trained: Run, oxford_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photo is spoilt after the last validation, so that only the plots miss it."""
    write, out = records.write_record, tmp_path / "run"

    def spoil_and_write(trainer: training.Trainer) -> None:
        for pair in trainer.photos.val:
            pair.image.write_bytes(b"no photo")
        assert (out / LOCK).exists(), "another run would remove what this one is still writing"
        write(trainer)

    monkeypatch.setattr(records, "write_record", spoil_and_write)
    assert run(["train", "--data", str(oxford_copy), "--output", str(out), *SMALL, "--epochs", "1", "-q"]) == 0
    printed, err = capsys.readouterr()
    assert not printed
    (line,) = err.splitlines()
    assert line.startswith(f"petseg: {out / 'predictions.png'}: cannot be drawn ({oxford_copy}")
    assert {path.name for path in out.iterdir()} == FILES - {"predictions.png"}
    assert json.loads((out / "run.json").read_text())["epochs"] == 1


def test_excluded_photos_are_named_even_if_quiet_and_the_run_exits_with_3(
    oxford_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = find(oxford_copy, Split.TRAINVAL)[0], tmp_path / "run"
    bad.image.write_bytes(b"no photo")
    args = ["train", "--data", str(oxford_copy), "--output", str(out), *SMALL, "--epochs", "1", "-q"]
    assert run([*args, "--set", "data.on_bad=skip"]) == 3
    printed, err = capsys.readouterr()
    assert not printed
    (line,) = err.splitlines()
    assert str(bad.image) in line
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.lr", "NAME=VALUE"),
        ("=3", "NAME=VALUE"),
        ("nonsense=1", "unknown setting 'nonsense'"),
        ("optimizer.speed=1", "unknown setting 'optimizer.speed'"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr is -1"),
        ("optimizer.lr=" + "9" * 400, "optimizer.lr is inf; a finite number is expected"),
        ("epochs=0", "epochs is 0"),
        ("epochs.more=1", "'epochs' is a setting"),
        ("amp=fp8", "amp is 'fp8'; one of auto, bf16, fp16, fp32"),
        ("amp=fp16", "bf16 or fp32"),
        ("model.width=3", "must be even"),
        ("data.height=33", "a multiple of 16"),
    ],
)
def test_a_bad_setting_is_named(
    setting: str, said: str, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), *SMALL, "--epochs", "1"]
    code, message = failed([*args, "--set", setting], capsys)
    assert code == 2
    assert message.startswith("petseg: ")
    assert said in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--size", "big"], 2, "192x256"),
        (["--size", "32x"], 2, "192x256"),
        (["--size", "33"], 2, "data.height is 33"),
        (["--size", "32x40"], 2, "data.width is 40"),
        (["--epochs", "many"], 2, "--epochs"),
        (["--epochs", "0"], 2, "epochs is 0"),
        (["--batch", "1"], 2, "batch is 1"),
        (["--batch", "100"], 8, "a batch takes 100"),
        (["--width", "3"], 2, "width is 3"),
        (["--set", "schedule.warmup=0.1"], 2, "no effect without schedule.name=one-cycle"),
        (["--set", "loss.teacher=0.3"], 2, "no effect without --teacher FILE"),
        (["--device", "cuda:99"], 5, "--device cuda:99"),
        (["--device", "toaster"], 5, "'toaster'"),
        (["--data", "/nowhere"], 8, "/nowhere"),
        (["--output", "/dev/null/run"], 6, "/dev/null/run: cannot be written to (/dev/null is not a folder)"),
        (["--config", "/nowhere.toml"], 9, "/nowhere.toml"),
        (["--init", "/nowhere.safetensors"], 4, "/nowhere.safetensors: no such file"),
        (["--resume"], 9, "nothing to resume"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_each_mistake_has_its_exit_code(
    options: list[str], code: int, said: str, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), *SMALL, "-q"]
    got, message = failed([*args, *options], capsys)
    assert got == code
    assert said in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "missing"), [([], "--data"), (["--data", "d"], "--output")])
def test_data_and_output_are_required(given: list[str], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failed(["train", *given], capsys)
    assert code == 2
    assert f"Missing option {missing}" in message


class Seen(Exception):
    """Carries the command's arguments to the trainer."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that returns the trainer's arguments for some options of `petseg train`."""

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            raise Seen(args, options)

    monkeypatch.setattr(training, "Trainer", Spy)

    def ask(*options: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        with pytest.raises(Seen) as caught:
            run(["train", "--data", "d", "--output", "o", "--device", "cpu", *options])
        args, given = caught.value.args
        return args, given

    return ask


def test_a_file_gives_way_to_options_and_options_to_set(tmp_path: Path, asked: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'epochs = 7\nbatch = 6\nseed = 5\n[model]\nwidth = 8\n[data]\nheight = 48\n[schedule]\nname = "cosine"\n'
    )
    (config, *_), _ = asked("--config", str(file))
    assert (config.epochs, config.batch, config.seed, config.model.width) == (7, 6, 5, 8)
    assert (config.data.height, config.data.width) == (48, 256)
    assert config.schedule.name == "cosine"
    (config, *_), _ = asked(
        "--config", str(file), "--epochs", "3", "--size", "32x64", "--set", "epochs=2", "--seed", "0"
    )
    assert (config.epochs, config.batch, config.seed) == (2, 6, 0)
    assert (config.data.height, config.data.width) == (32, 64)


@pytest.mark.parametrize("teacher", [[], ["--teacher", "t.onnx"]])
def test_the_settings_that_are_printed_make_the_same_run(
    tmp_path: Path, asked: Any, teacher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--recipe", "edge", "--size", "64x32", "--epochs", "3", "--set", "optimizer.lr=0.0005", *teacher]
    assert run(["train", *options, "--settings"]) == 0
    out, err = capsys.readouterr()
    assert not err
    (tmp_path / "run.toml").write_text(out)
    (want, *_), _ = asked(*options)
    (got, *_), _ = asked("--config", str(tmp_path / "run.toml"), *teacher)
    if teacher:
        assert got == want
    else:  # the recipe's settings of a teacher are comments
        plain = dataclasses.replace(want.augment, mix=0.0, mix_until=1.0)
        assert got == dataclasses.replace(want, augment=plain, loss=dataclasses.replace(want.loss, features=0.0))
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]


def test_settings_that_cannot_be_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failed(["train", "--settings", "--set", "schedule.warmup=0.3", "--set", "epochs=0"], capsys)
    assert (code, "epochs is 0" in message) == (2, True)
    code, message = failed(["train", "--settings", "--set", "schedule.warmup=0.2"], capsys)
    assert (code, "no effect without schedule.name=one-cycle" in message) == (2, True)
    code, message = failed(["train", "--settings", "--json"], capsys)
    assert (code, "leave out --json" in message) == (2, True)


def test_a_recipe_gives_way_to_a_file(tmp_path: Path, asked: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text("batch = 8\nseed = 5\n[schedule]\nwarmup = 0.5\n[data]\nworkers = 3\n")
    (config, *_), given = asked("--recipe", "best")
    assert (config.epochs, config.batch, config.schedule.name, config.schedule.warmup) == (100, 32, "one-cycle", 0.1)
    assert given["provenance"]["recipe"] == "best"
    (config, *_), _ = asked("--recipe", "best", "--config", str(file), "--seed", "6", "--set", "data.workers=4")
    assert (config.epochs, config.batch, config.seed, config.data.workers) == (100, 8, 6, 4)
    assert (config.schedule.name, config.schedule.warmup) == ("one-cycle", 0.5)


def test_settings_of_a_recipe_may_be_without_effect_but_not_those_of_the_user(
    asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (config, *_), _ = asked("--recipe", "edge", "--set", "schedule.name=cosine")
    assert (config.schedule.warmup, config.loss.features) == (0.1, 0.25)
    for setting in ("schedule.warmup=0.2", "loss.teacher=0.4"):
        options = ["--recipe", "edge", "--set", "schedule.name=cosine", "--set", setting]
        assert run(["train", "--data", "d", "--output", "o", *options]) == 2
        assert f"{setting.replace('=', ' is ')}, which has no effect" in capsys.readouterr().err


def test_another_network_is_a_matter_of_settings(asked: Any) -> None:
    (config, *_), _ = asked("--width", "8", "--set", "model.stem=strided", "--set", "model.levels=[1, 2, 3, 4]")
    assert (config.model.channels, config.model.stem) == ((8, 16, 24, 32), "strided")


def test_the_edge_networks_runs_are_of_one_network(asked: Any) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "embedded"
    files = sorted(folder.glob("edge*.toml"), key=lambda file: int(file.stem.removeprefix("edge")))
    runs = [asked("--config", str(file), "--teacher", "t.onnx")[0][0] for file in files]
    assert [run.epochs for run in runs] == [2, 16, 24, 36, 40, 40, 36, 36, 16, 34, 16]
    assert {run.model for run in runs} == {AttentionUNetConfig(width=16, stem="strided")}


def test_folders_device_start_and_command_reach_the_trainer(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/petseg", "train", "--data", "my pets"])
    (_, root, output), given = asked("--init", "start.safetensors", "--teacher", "t.onnx")
    assert (root, output) == (Path("d"), Path("o"))
    assert given["device"].type == "cpu"
    assert (given["init"], given["resume"]) == (Path("start.safetensors"), False)
    assert given["teacher"] == Path("t.onnx")
    assert given["provenance"]["command"] == "petseg train --data 'my pets'"


def test_without_an_option_the_device_is_chosen_automatically(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*names: object) -> None:
        raise Seen(names)

    monkeypatch.setattr("petseg.distributed.local_device", seen)
    monkeypatch.setattr("petseg.evaluate.open_model", seen)
    for args, names in (
        (["train", "--data", "d", "--output", "o"], ("auto",)),
        (["evaluate", "m.onnx", "--data", "d"], (Path("m.onnx"), "auto", "auto")),
        (
            ["evaluate", "m.onnx", "--data", "d", "--device", "gpu", "--backend", "ov"],
            (Path("m.onnx"), "gpu", "openvino"),
        ),
    ):
        with pytest.raises(Seen) as caught:
            run(args)
        assert caught.value.args == (names,)


@pytest.mark.parametrize(
    ("errors", "codes", "said"),
    [
        ([KeyboardInterrupt()] * 2, (143, 143), "petseg: interrupted\n"),
        ([NonFiniteLoss("loss nan")] * 2, (9, 0), "petseg: loss nan\n"),
        ([OutputError("full"), FirstRankFailed("rank 0 failed")], (6, 0), "petseg: full\n"),
    ],
    ids=["signal", "nan", "first"],
)
def test_what_ends_all_processes_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    errors: list[BaseException],
    codes: tuple[int, int],
    said: str,
) -> None:
    """The others exit with 0 after an error: with another code, torchrun would end the first before it has said it."""

    class Ends:
        stopped_by = signal.SIGTERM

        def __init__(self, *_: object, ranks: Ranks, **__: object) -> None:
            self.rank = ranks.rank

        def train(self) -> None:
            raise errors[self.rank]

    monkeypatch.setattr(training, "Trainer", Ends)
    args = ["train", "--data", "d", "--output", str(tmp_path), "--device", "cpu"]
    for rank in range(2):
        one = contextlib.nullcontext(Ranks(rank, 2, 2))
        monkeypatch.setattr("petseg.distributed.join", lambda device, one=one: one)
        assert run(args) == codes[rank]
        assert capsys.readouterr() == ("", "" if rank else said)


def test_the_commit_on_record_is_that_of_the_start(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Committed(training.Trainer):
        def train(self) -> Path:
            monkeypatch.setattr(records, "commit", lambda: "somebody else's")
            return super().train()

    monkeypatch.setattr(records, "commit", lambda: "of the start")
    monkeypatch.setattr(training, "Trainer", Committed)
    out = tmp_path / "run"
    assert run(["train", "--data", str(oxford_root), "--output", str(out), *SMALL, "--epochs", "1", "-q"]) == 0
    assert json.loads((out / "run.json").read_text())["commit"] == "of the start"
    for name in ("best", "last"):
        assert checkpoints.load(out / f"{name}.safetensors").meta["provenance"]["commit"] == "of the start"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("epochs = ", 9),
        ("\xff", 9),
        ("epochs = 'two'", 2),
        ("epochs = 0", 2),
        ("[nonsense]\nx = 1", 2),
        ("model = 3", 2),
        ("[schedule]\nwarmup = 0.1", 2),
    ],
)
def test_a_file_that_cannot_be_read_is_no_wrong_setting_in_it(
    tmp_path: Path, text: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode("latin-1"))
    args = ["train", "--data", "d", "--output", "o", "--config", str(file), "--width", "2"]
    assert failed(args, capsys)[0] == code


def test_ctrl_c_in_the_middle_of_a_run_keeps_it_and_resume_finishes_it(
    oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["train", "--data", str(oxford_root), "--output", str(folder), *SMALL, "--epochs", "12"]
    process = subprocess.Popen(
        [sys.executable, "-m", "petseg.cli", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MPLCONFIGDIR": FONTS},
    )
    try:
        while not (folder / "log.csv").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=250)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert not out
    assert err.splitlines()[-1] == "petseg: interrupted"
    assert "Traceback" not in err
    stopped = log_of(folder)
    assert 1 <= len(stopped) < 12
    assert checkpoints.load(folder / "last.safetensors").meta["state"]["step"] > 0
    assert not [path for path in folder.iterdir() if ".part" in path.name]

    assert run([*options, "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "resumed at step" in err
    rows = log_of(folder)
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(12)]
    assert rows[: len(stopped)] == stopped
    assert json.loads(out)["best"]["val_iou"] == max(float(row["val_iou"]) for row in rows)
    assert {path.name for path in folder.iterdir()} == FILES


# ------------------------------------------------------------------------------------------------ evaluate


def measured(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert run(["evaluate", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return dict(json.loads(out))


def test_evaluate_prints_what_the_measurement_gives(
    trained: Run, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained.folder / "best.safetensors"
    with open_model(best, "cpu") as opened:
        result = evaluate(opened.run, find(oxford_root, Split.TEST), 32, 32)
        shown = evaluate(as_shown(opened.run), find(oxford_root, Split.TEST), 32, 32)
        about = {"model": opened.describe(), "split": "test"}
        want = {**result.summary(opened.threshold), **about, "doubtful": "kept"}
        want_shown = {**shown.summary(opened.threshold), **about, "doubtful": "left out"}
    assert measured(capsys, best, "--data", oxford_root, "--device", "cpu", "--without-doubtful") == want_shown
    got = measured(capsys, best, "--data", oxford_root, "--device", "cpu")
    assert got == want
    assert got["photos"] == 6
    assert set(got["readings"]) == {"background", "pet", "ignored"}
    assert {"schema_version", "iou", "dice", "accuracy", "precision", "recall", "mean_image_iou"} <= set(got)


def test_the_threshold_can_be_another_than_the_models_own(
    trained: Run, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained.folder / "best.safetensors"
    own = measured(capsys, best, "--data", oxford_root)
    assert own["threshold"] == checkpoints.load(best).meta["spec"]["threshold"]
    low = measured(capsys, best, "--data", oxford_root, "--threshold", "0.001")
    assert (low["threshold"], low["recall"]) == (0.001, 1)
    high = measured(capsys, best, "--data", oxford_root, "--threshold", "0.999")
    assert (high["threshold"], high["recall"], high["precision"]) == (0.999, 0, None)


@pytest.mark.parametrize(("split", "photos"), [("test", 6), ("trainval", 24), ("val", 1), ("train", 23)])
def test_each_split_is_measured_by_its_own_photos(
    trained: Run, oxford_root: Path, split: str, photos: int, capsys: pytest.CaptureFixture[str]
) -> None:
    got = measured(capsys, trained.folder / "best.safetensors", "--data", oxford_root, "--split", split)
    assert (got["split"], got["photos"]) == (split, photos)


def test_the_validation_photos_are_those_of_the_run(
    trained: Run, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures during training are those that are measured afterwards."""
    row = trained.printed["best"]
    options = ["--split", "val", "--threshold", row["val_threshold"]]
    got = measured(capsys, trained.folder / "best.safetensors", "--data", oxford_root, *options)
    assert (got["iou"], got["dice"]) == pytest.approx((row["val_iou"], row["val_dice"]))


@pytest.fixture(scope="module")
def unusual(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose run held out a quarter of trainval, six photos, by another seed."""
    folder = tmp_path_factory.mktemp("unusual") / "run"
    split = ["--set", "data.val_fraction=0.25", "--set", "data.split_seed=3"]
    args = ["train", "--data", str(oxford_root), "--output", str(folder), *SMALL, "--epochs", "1", "-q", *split]
    assert run(args) == 0
    return folder / "best.safetensors"


def test_val_is_what_the_checkpoints_own_run_kept(
    unusual: Path, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = checkpoints.load(unusual).meta["validation"]
    options = ["--data", oxford_root, "--split", "val", "--report", tmp_path]
    got = measured(capsys, unusual, *options)
    assert (got["photos"], got["iou"]) == (6, pytest.approx(row["val_iou"]))
    assert measured(capsys, unusual, "--data", oxford_root, "--split", "train")["photos"] == 18
    about = json.loads((tmp_path / "report.json").read_text())["data"]
    assert (about["val_fraction"], about["split_seed"]) == (0.25, 3)
    same = ["--val-fraction", "0.25", "--split-seed", "3"]
    assert measured(capsys, unusual, *options, *same) == got


@pytest.mark.parametrize(
    ("options", "photos", "said"),
    [
        (["--val-fraction", "0.5"], 12, "the model was trained on 6 of the 12 photos of val"),
        (["--split-seed", "0"], 6, "the model was trained on 5 of the 6 photos of val"),
    ],
)
def test_another_val_than_the_runs_is_warned_about(
    unusual: Path, oxford_root: Path, options: list[str], photos: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", str(unusual), "--data", str(oxford_root), "--json", *options]
    assert run([*args, "--split", "val"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["photos"] == photos
    assert len(err.splitlines()) == 1
    assert said in err
    assert run([*args, "--split", "test"]) == 2, "the test photos are the same by any seed"


def test_val_is_what_the_run_of_an_exported_file_kept(
    unusual: Path, oxford_root: Path, tmp_path: Path, known_graph: None, capsys: pytest.CaptureFixture[str]
) -> None:
    row = checkpoints.load(unusual).meta["validation"]
    export(unusual, OnnxConfig(output=tmp_path / "m.onnx", data=oxford_root, split="test", photos=4))
    args = [tmp_path / "m.onnx", "--data", oxford_root, "--split"]
    got = measured(capsys, *args, "val")
    assert (got["photos"], got["iou"]) == (6, pytest.approx(row["val_iou"], abs=1e-3))
    assert measured(capsys, *args, "train")["photos"] == 18
    assert run(["evaluate", *map(str, args), "val", "--split-seed", "0", "-q"]) == 0
    assert "the model was trained on 5 of the 6 photos of val" in capsys.readouterr().err


def test_test_photos_that_a_model_was_trained_on_are_warned_about(
    unusual: Path, oxford_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainval, test = (oxford_copy / "annotations" / f"{split}.txt" for split in ("trainval", "test"))
    test.write_text(trainval.read_text())
    args = ["evaluate", str(unusual), "--data", str(oxford_copy), "--split", "test", "-q"]
    assert run(args) == 0
    assert capsys.readouterr().err == "petseg: the model was trained on 18 of the 24 photos of test\n"


def test_val_is_what_val_txt_lists(folder_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    args = ["train", "--data", str(folder_copy), "--output", str(tmp_path / "run"), *SMALL, "--epochs", "1", "-q"]
    assert run(args) == 0
    capsys.readouterr()
    best, own = tmp_path / "run" / "best.safetensors", ["--data", folder_copy, "--split", "val"]
    row = checkpoints.load(best).meta["validation"]
    got = measured(capsys, best, *own, "--report", tmp_path / "report")
    assert (got["photos"], got["iou"]) == (2, pytest.approx(row["val_iou"]))
    about = json.loads((tmp_path / "report" / "report.json").read_text())["data"]
    assert about["val_listing"] == "val.txt"
    assert {"val_fraction", "split_seed"} & about.keys() == set()
    export(best, OnnxConfig(output=tmp_path / "m.onnx", data=folder_copy, split="test", photos=2))
    assert measured(capsys, tmp_path / "m.onnx", *own)["iou"] == pytest.approx(row["val_iou"], abs=1e-3)

    code, message = failed(["evaluate", str(best), *map(str, own), "--val-fraction", "0.5"], capsys)
    assert code == 2
    assert "val.txt says which photos are val; leave out --val-fraction" in message
    (folder_copy / "val.txt").unlink()  # the exported file has their names
    again = measured(capsys, tmp_path / "m.onnx", *own)
    assert (again["photos"], again["iou"]) == (2, pytest.approx(row["val_iou"], abs=1e-3))
    for more, said in (
        (["--val-fraction", "0.5"], "4 of the 4"),
        ([], "1 of the 1"),
    ):
        if not more:
            (folder_copy / "val.txt").write_text("own_02\n")
        assert run(["evaluate", str(tmp_path / "m.onnx"), *map(str, own), *more, "-q"]) == 0
        err = capsys.readouterr().err
        assert f"the model was trained on {said} photos of val" in err


def test_masks_without_a_border_have_one_reading(
    trained: Run, folder_root: Path, oxford_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(trained.folder / "best.safetensors")
    assert run(["evaluate", best, "--data", str(folder_root), "--threshold", "0.25"]) == 0
    out = capsys.readouterr().out
    record = measured(capsys, best, "--data", folder_root, "--threshold", "0.25")
    rows = [line for line in out.splitlines() if f"{record['accuracy']:.4f}" in line]
    assert len(rows) == 1
    assert "no border" in rows[0]
    assert "the masks have no border" in out
    assert "ignored" not in out
    assert set(record["readings"]) == {"background", "pet", "ignored"}
    assert run(["evaluate", best, "--data", str(oxford_root)]) == 0
    assert "no border" not in capsys.readouterr().out


def test_masks_without_a_border_are_measured_at_the_threshold_for_cutouts_too(
    trained: Run, folder_root: Path, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that learned to exclude the outline is measured on masks that may include it."""
    saved, path = checkpoints.load(trained.folder / "best.safetensors"), tmp_path / "m.safetensors"
    spec = {**saved.meta["spec"], "threshold": 0.6, "cutout_threshold": 0.25}
    checkpoints.save_checkpoint(path, saved.tensors, {**saved.meta, "spec": spec})
    record = measured(capsys, path, "--data", folder_root)
    lower = measured(capsys, path, "--data", folder_root, "--threshold", "0.25")
    assert record["threshold"] == 0.6
    assert record["cutout"] == {name: lower[name] for name in record["cutout"]}
    assert record["cutout"].keys() >= {"threshold", "iou", "recall", "mean_image_iou"}
    assert "cutout" not in lower, "one threshold was asked for"
    assert run(["evaluate", str(path), "--data", str(folder_root)]) == 0
    out = capsys.readouterr().out
    (masks,), (cutouts,) = (
        [line for line in out.splitlines() if name in line] for name in ("0.600 (masks)", "0.250 (")
    )
    assert f"{record['iou']:.4f}" in masks
    assert f"{lower['iou']:.4f}" in cutouts
    assert "the masks have no border class" in out
    assert "if the masks include the fur at the outline, compare by the threshold for cutouts" in out
    assert "cutout" not in measured(capsys, path, "--data", oxford_root)
    checkpoints.save_checkpoint(path, saved.tensors, {**saved.meta, "spec": {**spec, "cutout_threshold": 0.6}})
    assert "cutout" not in measured(capsys, path, "--data", folder_root)


def test_a_test_split_without_photos_names_the_remedy(
    trained: Run, folder_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_copy / "test.txt").unlink()
    code, message = failed(["evaluate", str(trained.folder / "best.safetensors"), "--data", str(folder_copy)], capsys)
    assert code == 8
    assert f"the test split has no photos: name some in {folder_copy / 'test.txt'}, one on each line" in message


def test_people_get_a_table_and_the_report(
    trained: Run, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", str(trained.folder / "best.safetensors"), "--data", str(oxford_root)]
    assert run([*args, "--output", str(tmp_path / "report"), "--threshold", "0.25"]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert "6 photos, threshold 0.250" in out
    assert "images.csv" in out
    names = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
    for title, values in record["readings"].items():
        (row,) = (line for line in out.splitlines() if re.match(rf"\W*{title} ", line))
        assert re.findall(r"\d\.\d{4}", row) == [f"{values[name]:.4f}" for name in names]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"evaluation.json", "images.csv", "worst.png"}
    assert run([*args, "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_an_undefined_ratio_and_an_empty_mask_are_said_in_the_table(
    trained: Run, oxford_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in find(oxford_copy, Split.TEST):
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    args = ["evaluate", str(trained.folder / "best.safetensors"), "--data", str(oxford_copy), "--threshold", "0.001"]
    assert run(args) == 0
    out = capsys.readouterr().out
    assert "nan" not in out
    assert "masks without any pet, counted nevertheless: pet_24, pet_25" in out


def test_names_that_are_no_utf8_or_command_the_terminal_are_trained_on_measured_and_shown_escaped(
    folder_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("images", "masks"):
        for path in (folder_copy / part).iterdir():
            path.rename(path.with_name(f"caf\udce9\x1b[31m{path.name}"))
    (folder_copy / "test.txt").unlink()
    args = ["--data", str(folder_copy)]
    assert run(["train", *args, "--output", str(tmp_path / "run"), *SMALL, "--epochs", "1", "-q"]) == 0
    Image.new("L", (64, 64)).save(folder_copy / "masks" / "caf\udce9\x1b[31mown_00.png")
    (folder_copy / "masks" / "caf\udce9\x1b[31mown_01.png").write_bytes(b"no mask")
    args += ["--split", "trainval", "--output", str(tmp_path), "--report", str(tmp_path)]
    assert run(["evaluate", str(tmp_path / "run" / "best.safetensors"), *args]) == 3
    out, err = capsys.readouterr()
    assert r"counted nevertheless: caf\udce9\x1b[31mown_00" in out
    assert r"caf\udce9\x1b[31mown_01.png: not an image" in err
    assert "\x1b" not in out + err
    assert r"caf\udce9" in (tmp_path / "images.csv").read_text(encoding="utf-8")
    assert run(["evaluate", str(tmp_path / "run" / "best.safetensors"), *args[:2], "--split", "val", "-q"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--device", "cuda:99"], 5, "--device cuda:99"),
        (["--threshold", "1.5"], 2, "--threshold"),
        (["--threshold", "0"], 2, "--threshold"),
        (["--threshold", "nan"], 2, "--threshold"),
        (["--split", "val", "--val-fraction", "nan"], 2, "--val-fraction"),
        (["--split", "val", "--val-fraction", "1"], 2, "--val-fraction"),
        (["--val-fraction", "0.5"], 2, "have no effect on --split test"),
        (["--split", "trainval", "--split-seed", "0"], 2, "have no effect on --split trainval"),
        (["--split", "all"], 2, "--split"),
        (["--batch", "0"], 2, "--batch"),
        (["--data", "/nowhere"], 8, "/nowhere"),
        (["--output", "/dev/null/report"], 6, "/dev/null/report"),
    ],
)
def test_each_mistake_in_evaluate_has_its_exit_code(
    trained: Run,
    oxford_root: Path,
    options: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["evaluate", str(trained.folder / "best.safetensors"), "--data", str(oxford_root), *options]
    got, message = failed(args, capsys)
    assert got == code
    assert said in message


@pytest.mark.parametrize("name", ["last.safetensors", "log.csv", "none.safetensors", "none.onnx"])
def test_what_is_no_model_is_exit_code_4(
    trained: Run, oxford_root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failed(["evaluate", str(trained.folder / name), "--data", str(oxford_root)], capsys)
    assert code == 4
    assert name in message


def test_a_device_without_memory_for_the_model_or_the_picture_is_one_line(
    trained: Run, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    args = ["evaluate", str(trained.folder / "best.safetensors"), "--data", str(oxford_root), "--output", str(tmp_path)]
    for place in ("petseg.plots.worst", "petseg.evaluate.evaluate", "petseg.model.AttentionUNet.to"):
        monkeypatch.setattr(place, full)
        code, message = failed(args, capsys)
        remedy = "use a smaller --batch" if place == "petseg.evaluate.evaluate" else "free some memory on the device"
        assert code == 5
        assert message.startswith(f"petseg: out of memory: {remedy}")
        assert message.count("\n") <= 1


# ------------------------------------------------------------------------------------------------ data check


def checked(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    assert run(["data", "check", *map(str, args), "--json"]) == code
    out, err = capsys.readouterr()
    assert not err
    return dict(json.loads(out))


def test_a_good_data_set_is_usable(oxford_root: Path, folder_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("missing", "unreadable", "wrong_size", "empty", "orientation_unsure", "unused")
    nothing: dict[str, list[str]] = {kind: [] for kind in kinds}
    good = {"schema_version": 1, "usable": True, **nothing}
    assert checked(capsys, oxford_root) == {**good, "pairs": 30, "splits": {"trainval": 24, "test": 6}}
    assert checked(capsys, oxford_root, "--split", "test") == {**good, "pairs": 6, "splits": {"test": 6}}
    assert checked(capsys, folder_root) == {**good, "pairs": 12, "splits": {"trainval": 9, "test": 3}}
    assert run(["data", "check", str(oxford_root)]) == 0
    *_, splits, last = capsys.readouterr().out.splitlines()
    assert splits == "24 pairs in trainval, 6 pairs in test"
    assert last.startswith("30 pairs: 0 missing")


def test_a_folder_that_is_for_validation_alone_is_measured(
    trained: Run, folder_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [pair.name for pair in find(folder_copy, Split.TRAINVAL)]
    (folder_copy / "val.txt").write_text("\n".join(every))
    best, data = trained.folder / "best.safetensors", ["--data", str(folder_copy)]
    assert run(["evaluate", str(best), *data, "--split", "val", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["photos"], err) == (len(every), "")
    code, message = failed(["evaluate", str(best), *data, "--split", "train"], capsys)
    assert (code, "the train split has no photos" in message) == (8, True)


def test_photos_are_counted_as_val_txt_divides_them(folder_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    found = checked(capsys, folder_copy)
    assert (found["pairs"], found["splits"]) == (12, {"train": 7, "val": 2, "test": 3})
    assert checked(capsys, folder_copy, "--split", "trainval")["splits"] == {"train": 7, "val": 2}
    assert checked(capsys, folder_copy, "--split", "test")["splits"] == {"test": 3}
    (folder_copy / "val.txt").write_text("own_99\n")
    code, message = failed(["data", "check", str(folder_copy)], capsys)
    assert code == 8
    assert "val.txt: 1 lines name no photo" in message


def test_unused_files_in_a_folder_are_named(folder_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder_copy / "images" / "own_04.png").rename(folder_copy / "images" / "own_04.svg")
    (folder_copy / "images" / ".hidden").touch()
    found = checked(capsys, folder_copy)
    assert (found["pairs"], found["usable"]) == (11, True)
    assert found["unused"] == [str(folder_copy / part) for part in ("images/own_04.svg", "masks/own_04.png")]


def test_a_listing_that_cannot_be_read_is_no_absent_split(
    oxford_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (oxford_copy / "annotations" / "trainval.txt").write_bytes(b"pet_00 1 1 1\n\xe9")
    assert run(["data", "check", str(oxford_copy)]) == 8
    assert "trainval.txt: cannot be read" in capsys.readouterr().err


def test_everything_that_is_wrong_is_named(oxford_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, fourth, *_ = find(oxford_copy, Split.TRAINVAL)
    first.image.unlink()
    second.image.write_bytes(second.image.read_bytes()[:200])
    Image.fromarray(np.ones((10, 20), np.uint8)).save(third.mask)
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(fourth.mask)
    found = checked(capsys, oxford_copy, code=8)
    assert (found["pairs"], found["usable"]) == (30, False)
    assert found["missing"] == [str(first.image)]
    assert [str(second.image) in line for line in found["unreadable"]] == [True]
    assert found["wrong_size"] == [f"{third.name}: photo 64 x 64, mask 20 x 10"]
    assert found["empty"] == [fourth.name]
    assert checked(capsys, oxford_copy, "--split", "test")["usable"]

    assert run(["data", "check", str(oxford_copy)]) == 8
    out, err = capsys.readouterr()
    assert f"missing: {first.image}" in out
    assert f"empty: {fourth.name}" in out
    counted = "1 missing, 1 unreadable, 1 wrong size, 1 empty, 0 orientation unsure, 0 unused"
    assert out.splitlines()[-1] == f"30 pairs: {counted}: not usable"
    assert not err
    assert run(["data", "check", str(oxford_copy), "-q"]) == 8
    assert capsys.readouterr() == ("", "")


def test_an_empty_mask_alone_does_not_spoil_a_data_set(oxford_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = find(oxford_copy, Split.TEST)[0]
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    found = checked(capsys, oxford_copy)
    assert found["usable"]
    assert found["empty"] == [pair.name]


def test_a_folder_without_data_is_exit_code_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failed(["data", "check", str(tmp_path)], capsys)
    assert code == 8
    assert str(tmp_path) in message
