from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from petseg.config import (
    AugmentConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    from_dict,
    load_toml,
    override,
    reject_unused,
    to_dict,
    to_toml,
)
from petseg.model import AttentionUNetConfig
from petseg_runtime.errors import TrainingError, UsageError

UNUSUAL = TrainConfig(
    epochs=7,
    batch=3,
    seed=-5,
    ema=0.0,
    amp="bf16",
    model=AttentionUNetConfig(width=16, levels=(2, 3, 5), stem="strided", ungated=(1,), decoder_convs=1),
    early_stop=4,
    compile=True,
    data=DataConfig(height=192, width=256, val_fraction=0.2, split_seed=3, border_target=0.5, workers=2, on_bad="skip"),
    augment=AugmentConfig(flip=0.1, rotate=30, translate=0.1, scale_min=0.5, scale_max=2.0, hue=0.1),
    loss=LossConfig(bce=1.0, dice=0.0, dice_form="semimetric", epsilon=0.5, teacher=0.9, features=0.2),
    optimizer=OptimizerConfig(lr=0.1, weight_decay=0.0, clip=5.0),
    schedule=ScheduleConfig(name="one-cycle", restart_epochs=3, restart_factor=1, warmup=0.1),
)


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL])
def test_to_dict_and_back_through_json(config: TrainConfig) -> None:
    raw = json.loads(json.dumps(to_dict(config)))
    assert from_dict(TrainConfig, raw) == config


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL])
def test_to_toml_and_back(config: TrainConfig, taught: bool, tmp_path: Path) -> None:
    """Settings with an effect come back; others are comments, and a run with these settings is not rejected."""
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config, taught))
    back = from_dict(TrainConfig, load_toml(file))
    schedule = ScheduleConfig(name=config.schedule.name)
    used = (
        dataclasses.replace(schedule, warmup=config.schedule.warmup)
        if schedule.name == "one-cycle"
        else dataclasses.replace(schedule, restart_epochs=10, restart_factor=2)
    )
    loss = dataclasses.replace(
        config.loss,
        dice_form=config.loss.dice_form if config.loss.dice else "soft",
        epsilon=config.loss.epsilon if config.loss.dice else 1.0,
        teacher=config.loss.teacher if taught else 0.5,
        features=config.loss.features if taught else 0.0,
    )
    assert back == dataclasses.replace(config, schedule=used, loss=loss)
    reject_unused(back, TrainConfig(), taught)
    assert tomllib.loads(re.sub(r"^# ", "", file.read_text(), flags=re.MULTILINE)) == to_dict(config)


def test_a_setting_without_effect_is_a_comment_with_what_it_needs() -> None:
    lines = to_toml(UNUSUAL, taught=False).splitlines()
    assert "# teacher = 0.9  # no effect without --teacher FILE" in lines
    assert "# restart_epochs = 3  # no effect without schedule.name=cosine-restarts" in lines
    assert "warmup = 0.1" in lines
    assert "teacher = 0.9" in to_toml(UNUSUAL, taught=True).splitlines()


def test_the_unusual_config_differs_everywhere() -> None:
    """Otherwise the round trip above could lose a setting unnoticed."""
    same = []
    for f in dataclasses.fields(TrainConfig):
        one, two = getattr(TrainConfig(), f.name), getattr(UNUSUAL, f.name)
        same += [f.name] if one == two else []
    assert same == []


def test_the_defaults_are_the_published_recipe() -> None:
    config = from_dict(TrainConfig, {})
    assert config == TrainConfig()
    assert (config.epochs, config.batch, config.ema) == (30, 16, 0.998)
    assert (config.model.width, config.loss.bce, config.loss.dice) == (64, 0.5, 0.5)
    assert (config.schedule.name, config.augment.flip, config.augment.rotate) == ("cosine-restarts", 0.5, 15.0)


def test_what_is_missing_keeps_its_default() -> None:
    config = from_dict(TrainConfig, {"optimizer": {"clip": 2}})
    assert config.optimizer == OptimizerConfig(clip=2.0)
    assert config.data == DataConfig()


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    lr = from_dict(TrainConfig, {"optimizer": {"lr": 1}}).optimizer.lr
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("raw", "named", "offered"),
    [
        ({"epoch": 3}, "'epoch'", "epochs"),
        ({"optimizer": {"learning_rate": 1}}, "'optimizer.learning_rate'", "lr"),
        ({"model": {"channels": 3}}, "'model.channels'", "width"),
    ],
)
def test_an_unknown_name_is_rejected_with_the_known_ones(raw: dict[str, Any], named: str, offered: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown setting {named}.*\b{offered}\b"):
        from_dict(TrainConfig, raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"epochs": "3"}, "epochs is '3'; int"),
        ({"epochs": 3.0}, "epochs is 3.0; int"),
        ({"epochs": True}, "epochs is True; int"),
        ({"ema": True}, "ema is True; float"),
        ({"ema": None}, "ema is None; float"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast'; float"),
        ({"optimizer": {"lr": [1]}}, r"optimizer.lr is \[1\]; float"),
        ({"amp": "fp8"}, "amp is 'fp8'; one of auto, bf16, fp16, fp32"),
        ({"amp": 16}, "amp is 16; one of"),
        ({"schedule": {"name": "step"}}, "schedule.name is 'step'; one of cosine-restarts, one-cycle, cosine"),
        ({"model": 64}, "model is 64; a table"),
        ({"model": {"levels": 5}}, "model.levels is 5; a list"),
        ({"model": {"levels": "12"}}, "model.levels is '12'; a list"),
        ({"model": {"levels": [1, "2"]}}, "model.levels is '2'; int"),
        ({"model": {"ungated": [1.0]}}, "model.ungated is 1.0; int"),
        ({"model": {"stem": "none"}}, "model.stem is 'none'; one of full, strided"),
        ({"data": [1]}, r"data is \[1\]; a table"),
        ({"data": {"workers": "many"}}, "data.workers is 'many'; int or auto is expected"),
        ({"data": {"workers": 2.0}}, "data.workers is 2.0; int"),
        ({"data": {"workers": True}}, "data.workers is True; int"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr is inf; a finite number"),
    ],
)
def test_a_wrong_type_is_rejected_by_name(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_dict(TrainConfig, raw)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", v) for v in (0, -1)),
        *(("batch", v) for v in (1, 0)),
        *(("ema", v) for v in (-0.1, 1.0, NAN)),
        *(("model.width", v) for v in (0, 3, -2, 10**20)),
        *(("data.height", v) for v in (0, -16, 100)),
        *(("data.width", v) for v in (0, -16, 100)),
        *(("data.val_fraction", v) for v in (0.0, 1.0, NAN)),
        *(("data.border_target", v) for v in (-0.1, 1.1, NAN)),
        ("data.workers", -1),
        *(("augment.flip", v) for v in (-0.1, 1.1)),
        *(("augment.rotate", v) for v in (-1.0, 181.0)),
        *(("augment.translate", v) for v in (-0.1, 1.0)),
        *(("augment.scale_min", v) for v in (1e-300, 1.5)),
        ("augment.scale_max", 101.0),
        *((f"augment.{n}", v) for n in ("brightness", "contrast", "saturation") for v in (-0.1, 1.1, NAN)),
        *(("augment.hue", v) for v in (-0.1, 0.6)),
        *(("augment.mix", v) for v in (-0.1, 1.1, NAN)),
        *(("augment.mix_until", v) for v in (0.0, 1.1, NAN)),
        *(("loss.bce", v) for v in (-0.1, NAN)),
        *(("loss.dice", v) for v in (-0.1, NAN)),
        *(("loss.epsilon", v) for v in (0.0, -1.0)),
        *(("loss.teacher", v) for v in (-0.1, 1.1, NAN)),
        *(("loss.features", v) for v in (-0.1, NAN)),
        *(("optimizer.lr", v) for v in (0.0, -1e-3, NAN)),
        *(("optimizer.weight_decay", v) for v in (-0.1, NAN)),
        *(("optimizer.clip", v) for v in (0.0, -1.0, NAN)),
        *(("schedule.restart_epochs", v) for v in (0, -1)),
        *(("schedule.restart_factor", v) for v in (0, -1)),
        *(("schedule.warmup", v) for v in (0.0, 1.0)),
    ],
)
def test_a_value_out_of_range_is_rejected_by_name(name: str, value: float) -> None:
    *section, key = name.split(".")
    raw: dict[str, Any] = {section[0]: {key: value}} if section else {key: value}
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        from_dict(TrainConfig, raw)


def test_no_loss_at_all_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"loss\.bce \+ loss\.dice"):
        LossConfig(bce=0, dice=0)


@pytest.mark.parametrize(
    "raw",
    [
        {"epochs": 1, "batch": 2, "ema": 0.0},
        {"data": {"workers": 0}},
        {"data": {"height": 16, "width": 4096, "border_target": 1.0}},
        {"augment": {"flip": 1.0, "rotate": 180.0, "hue": 0.5, "brightness": 1.0, "scale_min": 1.0, "scale_max": 1.0}},
        {"augment": {"flip": 0.0, "rotate": 0.0, "hue": 0.0, "scale_min": 0.01, "scale_max": 100.0}},
        {"loss": {"bce": 0.0, "dice": 1.0, "teacher": 0.0}},
        {"loss": {"teacher": 1.0}},
        {"schedule": {"restart_epochs": 1, "restart_factor": 1}},
        {"optimizer": {"weight_decay": 0.0}},
        {"model": {"levels": [1, 1], "ungated": [1], "decoder_convs": 1}},
        {"model": {"width": 2**16}},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(raw: dict[str, Any]) -> None:
    from_dict(TrainConfig, raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"data": {"height": 33}}, "data.height is 33; it must be a multiple of 16"),
        ({"model": {"width": 3}}, "model.width is 3; the attention gates halve it, so it must be even and positive"),
    ],
)
def test_a_setting_is_named_once(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_dict(TrainConfig, raw)
    assert str(caught.value) == said
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("raw", "taught", "said"),
    [
        ({"schedule": {"warmup": 0.1}}, False, "schedule.warmup is 0.1, .*without schedule.name=one-cycle.* at 0.3$"),
        ({"schedule": {"name": "cosine", "warmup": 0.1}}, False, "schedule.warmup is 0.1"),
        ({"schedule": {"name": "one-cycle", "restart_epochs": 5}}, False, "schedule.restart_epochs is 5, .*at 10$"),
        ({"schedule": {"name": "constant", "restart_factor": 1}}, False, "restart_factor is 1, .*name=cosine-restarts"),
        ({"loss": {"dice": 0.0, "epsilon": 2.0}}, False, "loss.epsilon is 2.0, .*loss.dice above 0"),
        ({"loss": {"dice": 0.0, "dice_form": "semimetric"}}, False, "loss.dice_form is 'semimetric', .*loss.dice"),
        (
            {"loss": {"teacher": 0.3}},
            False,
            "loss.teacher is 0.3, which has no effect without --teacher FILE; add that",
        ),
        ({"loss": {"features": 0.3}}, False, "loss.features is 0.3, .*without --teacher FILE"),
    ],
)
def test_a_setting_without_effect_is_rejected_with_what_it_needs(raw: dict[str, Any], taught: bool, said: str) -> None:
    config = from_dict(TrainConfig, raw)
    with pytest.raises(UsageError, match=said):
        reject_unused(config, TrainConfig(), taught)
    reject_unused(config, config, taught)  # as a recipe has it


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"schedule": {"restart_epochs": 5, "restart_factor": 1}},
        {"schedule": {"name": "one-cycle", "warmup": 0.1}},
        {"schedule": {"name": "cosine", "warmup": 0.3}},
        {"loss": {"teacher": 0.3}},
        {"loss": {"epsilon": 2.0}},
    ],
)
def test_a_setting_that_is_used_or_at_its_default_is_accepted(raw: dict[str, Any]) -> None:
    reject_unused(from_dict(TrainConfig, raw), TrainConfig(), taught=True)


@pytest.mark.parametrize(("text", "workers"), [("auto", "auto"), ('"auto"', "auto"), ("3", 3), ("0", 0)])
def test_workers_are_a_number_or_auto(text: str, workers: int | str) -> None:
    raw: dict[str, Any] = {}
    override(raw, f"data.workers={text}")
    assert from_dict(TrainConfig, raw).data.workers == workers
    assert DataConfig().workers == "auto"


@pytest.mark.parametrize("amp", ["auto", "bf16", "fp16", "fp32"])
def test_every_precision_is_allowed(amp: str) -> None:
    assert from_dict(TrainConfig, {"amp": amp}).amp == amp


def test_toml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('epochs = 3\n[optimizer]\nlr = 2e-3\n[schedule]\nname = "cosine"\n', encoding="utf-8")
    config = from_dict(TrainConfig, load_toml(path))
    assert (config.epochs, config.optimizer.lr, config.schedule.name) == (3, 0.002, "cosine")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"epochs = ", "not valid TOML"),
        (b"[optimizer\nlr = 1", "not valid TOML"),
        (b"epochs = 1\nepochs = 2\n", "not valid TOML"),
        (b"name = '\xff\xfe'", "not valid TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_rejected_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=rf"run\.toml: {said}"):
        load_toml(path)


def test_a_file_that_cannot_be_read_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none\.toml: cannot be read"):
        load_toml(tmp_path / "none.toml")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_toml(tmp_path)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("epochs=3", {"epochs": 3}),
        (" epochs = 3 ", {"epochs": 3}),
        ("optimizer.lr=0.002", {"optimizer": {"lr": 0.002}}),
        ("optimizer.lr=2e-3", {"optimizer": {"lr": 0.002}}),
        ("amp=fp32", {"amp": "fp32"}),
        ('amp="fp32"', {"amp": "fp32"}),
        ("schedule.name=one-cycle", {"schedule": {"name": "one-cycle"}}),
        ("a.b.c=true", {"a": {"b": {"c": True}}}),
        ("note=a=b", {"note": "a=b"}),
        ("note=", {"note": ""}),
    ],
)
def test_override_takes_toml_or_a_bare_word(assignment: str, expected: dict[str, Any]) -> None:
    raw: dict[str, Any] = {}
    override(raw, assignment)
    assert raw == expected


def test_override_replaces_one_value_and_keeps_its_neighbours() -> None:
    raw = {"epochs": 3, "optimizer": {"lr": 0.1, "clip": 2.0}}
    override(raw, "optimizer.lr=0.5")
    assert raw == {"epochs": 3, "optimizer": {"lr": 0.5, "clip": 2.0}}


@pytest.mark.parametrize("assignment", ["epochs", "", "=3", "  =3", "epochs:3"])
def test_override_without_a_name_or_a_value_is_rejected(assignment: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        override({}, assignment)


def test_a_number_of_more_digits_than_python_reads_is_rejected_in_one_short_line() -> None:
    with pytest.raises(UsageError, match=r"^--set 'seed=1{55}': .{1,200}$"):
        override({}, "seed=" + "1" * 5000)


@pytest.mark.parametrize(
    "assignment", ["epochs=" + "[" * 5000, "epochs=" + "[" * 50 + "]" * 50, "model.width" + ".a" * 5000 + "=1"]
)
def test_a_setting_that_nests_too_deeply_is_rejected_in_one_short_line(assignment: str) -> None:
    with pytest.raises(UsageError, match=r"^--set '.{60}': more than 30 levels of nested tables and lists; a"):
        override({}, assignment)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 5000, "not valid TOML"),
        ("epochs = " + "[" * 50 + "]" * 50, "more than 30 levels of nested tables and lists"),
        ("[model]\nwidth" + ".a" * 5000 + " = 1", "more than 30 levels of nested tables and lists"),
    ],
)
def test_a_file_that_nests_too_deeply_is_rejected_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=rf"run\.toml: {said}"):
        load_toml(path)


def test_override_inside_a_plain_setting_is_rejected() -> None:
    with pytest.raises(UsageError, match="'epochs' is a setting"):
        override({"epochs": 3}, "epochs.lr=3")
