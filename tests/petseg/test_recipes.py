"""The recipes have the settings that they claim, and each one runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from petseg import recipes
from petseg.checkpoint import load
from petseg.cli import run
from petseg.config import TrainConfig, from_dict
from petseg.model import AttentionUNetConfig
from petseg_runtime.errors import UsageError

#: A few steps of any recipe.
SHORT = ["--epochs", "1", "--batch", "4", "--size", "32", "--device", "cpu"]
SHORT += ["--set", "model.width=2", "--set", "amp=fp32", "--set", "data.workers=0", "--set", "data.val_fraction=0.1"]


def config_of(name: str) -> TrainConfig:
    return from_dict(TrainConfig, recipes.load(name))


def test_there_are_three() -> None:
    assert recipes.names() == ["best", "edge", "published"]


@pytest.mark.parametrize("name", recipes.names())
def test_each_runs_and_is_on_record(
    name: str, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), "--recipe", name, *SHORT, "--json"]
    assert run(args) == 0, capsys.readouterr().err
    made = load(tmp_path / "run" / "best.safetensors")
    assert made.meta["provenance"]["recipe"] == name
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"] == name
    assert record["config"]["schedule"]["name"] == config_of(name).schedule.name
    if name == "edge":  # again, with distillation
        again = [*args, "--output", str(tmp_path / "again"), "--teacher", str(tmp_path / "run" / "best.safetensors")]
        assert run(again) == 0
        assert load(tmp_path / "again" / "best.safetensors").meta["teacher"]["identity"] == made.sha256


def test_published_is_the_defaults() -> None:
    assert config_of("published") == TrainConfig()


def test_best_and_edge_are_of_the_networks_they_name() -> None:
    assert config_of("best").model == AttentionUNetConfig()
    assert config_of("edge").model == AttentionUNetConfig(width=16, stem="strided")
    for name in recipes.names():
        assert (config_of(name).data.height, config_of(name).data.width) == (256, 256)


def test_none_takes_a_number_of_workers_for_granted() -> None:
    assert {config_of(name).data.workers for name in recipes.names()} == {"auto"}


def test_what_has_not_been_run_says_so() -> None:
    assert "never run" in recipes.describe("best")
    for name in recipes.names():
        assert 20 < len(recipes.describe(name)) < 120


def test_an_unknown_name_is_rejected_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"'bset'.*best, edge, published"):
        recipes.load("bset")
    assert run(["train", "--data", "d", "--output", "o", "--recipe", "bset"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert all(recipes.describe(name) in err for name in recipes.names())


@pytest.mark.parametrize("more", [[], ["--data", "d", "--output", "o"]])
def test_without_a_name_they_are_listed(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *more, "--recipe"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert [line.split()[0] for line in out.splitlines()] == recipes.names()


@pytest.mark.parametrize("args", [["--recipe", "--json"], ["--json", "--recipe"]])
def test_as_json_they_are_listed_with_their_settings(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    assert [each["name"] for each in found["recipes"]] == recipes.names()
    for each in found["recipes"]:
        assert each["about"] == recipes.describe(each["name"])
        assert from_dict(TrainConfig, each["settings"]) == config_of(each["name"])
