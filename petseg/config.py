"""The settings of a training run, as shared by the command line, TOML files and checkpoints.

An invalid setting raises UsageError, whether it comes from an option, from ``--set`` or from a readable file. A file
that cannot be read or parsed raises TrainingError, and invalid settings in a checkpoint raise CheckpointError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union

from petseg.data import SPLIT_SEED, VAL_FRACTION
from petseg.model import AttentionUNetConfig
from petseg_runtime.errors import TrainingError, UsageError
from petseg_runtime.spec import STRIDE

__all__ = [
    "MOST_LEVELS",
    "AugmentConfig",
    "DataConfig",
    "LossConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "from_dict",
    "is_deep",
    "load_toml",
    "merge",
    "override",
    "reject_unused",
    "to_dict",
    "to_toml",
    "unused_settings",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which photos to use, at which size, and how the border class is taught.

    Attributes:
        height: Training height in pixels, a multiple of 16. (The published source gives no input size.)
        width: Training width in pixels, a multiple of 16.
        val_fraction: Share of trainval held out for validation, on which checkpoint and threshold are chosen. This and
            ``split_seed`` have no effect if ``val.txt`` in the data folder lists the validation photos.
        split_seed: Seed of that split; separate from the run's seed, so that runs can be compared.
        border_target: Target for the trimap's border class: 0 background (published), 1 pet, in between: a soft target.
            The network does not learn to predict quite that value: the soft Dice loss pushes soft targets below half of
            the Dice coefficient to 0, and others to 1 (see :func:`petseg.losses.dice_loss`).
        workers: Dataloader workers, which augment the photos; 0 augments in the training process. ``auto``: on a GPU,
            all cores but two (with several GPUs, of each one's share), at most 16, and no more than have room for their
            batches in /dev/shm; on a CPU none, because they would only take cores away from it.
        on_bad: What to do about a photo that cannot be read, or whose mask has another size: ``stop`` ends the run with
            an error that names it, ``skip`` excludes the photo, names and counts it.
    """

    height: int = 256
    width: int = 256
    val_fraction: float = VAL_FRACTION
    split_seed: int = SPLIT_SEED
    border_target: float = 0.0
    workers: int | Literal["auto"] = "auto"
    on_bad: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _require(self.height > 0 and self.height % STRIDE == 0, "data.height", self.height, f"a multiple of {STRIDE}")
        _require(self.width > 0 and self.width % STRIDE == 0, "data.width", self.width, f"a multiple of {STRIDE}")
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1, both excluded")
        _require(0 <= self.border_target <= 1, "data.border_target", self.border_target, "between 0 and 1")
        _require(self.workers == "auto" or self.workers >= 0, "data.workers", self.workers, "auto, or 0 or more")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation, the same for a photo and its mask. The published run flips, rotates and jitters colours.

    Attributes:
        flip: Probability of a horizontal flip.
        rotate: Largest rotation either way, degrees.
        translate: Largest shift, as a share of the image size.
        scale_min: Smallest scale, at least 0.01 (below 1 shrinks; the uncovered edge becomes black and background).
        scale_max: Largest scale, at most 100 (above 1 crops).
        brightness: The factor is drawn from 1 +- this; 0 changes nothing.
        contrast: As for ``brightness``.
        saturation: As for ``brightness``.
        hue: The shift is drawn from +- this, in turns of the colour circle (at most 0.5).
        paste: Probability that the pet of another, separately augmented photo is pasted over this one (Ghiasi et al.
            2021, "Simple Copy-Paste", arXiv:2012.07177).
        mix: Probability that another, separately augmented photo is blended into this one, with a weight drawn from 0
            to one half (Zhang et al. 2018, "mixup", arXiv:1710.09412). The target of such a picture comes only from a
            teacher of features, which sees the same picture (:class:`petseg.objective.Distillation`); without one
            nothing is mixed.
        mix_until: Share of the epochs, rounded up, after which nothing is mixed, so that the last ones see unmixed
            photos (as in Ge et al. 2021, "YOLOX", arXiv:2107.08430).
    """

    flip: float = 0.5
    rotate: float = 15.0
    translate: float = 0.0
    scale_min: float = 1.0
    scale_max: float = 1.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0
    paste: float = 0.0
    mix: float = 0.0
    mix_until: float = 1.0

    def __post_init__(self) -> None:
        _require(0 <= self.flip <= 1, "augment.flip", self.flip, "between 0 and 1")
        _require(0 <= self.rotate <= 180, "augment.rotate", self.rotate, "between 0 and 180 degrees")
        _require(0 <= self.translate < 1, "augment.translate", self.translate, "at least 0 and below 1")
        _require(0.01 <= self.scale_min <= self.scale_max, "augment.scale_min", self.scale_min, "0.01 to scale_max")
        _require(self.scale_max <= 100, "augment.scale_max", self.scale_max, "at most 100")
        for name in ("brightness", "contrast", "saturation"):
            _require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "between 0 and 1")
        _require(0 <= self.hue <= 0.5, "augment.hue", self.hue, "between 0 and 0.5")
        _require(0 <= self.paste <= 1, "augment.paste", self.paste, "between 0 and 1")
        _require(0 <= self.mix <= 1, "augment.mix", self.mix, "between 0 and 1")
        _require(0 < self.mix_until <= 1, "augment.mix_until", self.mix_until, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """``bce * BCE + dice * L_Dice + features * distance``; 0.5, 0.5 and 0 are the published weights.

    The first two terms are in :mod:`petseg.losses`, the last in :mod:`petseg.objective`; the log has their sum.

    Attributes:
        bce: Weight of the cross-entropy.
        dice: Weight of the Dice loss.
        dice_form: ``soft``, the published one, or ``semimetric``, which equals it for hard targets and has its minimum
            at the target for soft ones, too (:func:`petseg.losses.semimetric_dice_loss`). We have not trained with
            ``semimetric`` yet.
        epsilon: Added to the numerator and denominator of the Dice loss, so that it is defined without a pet.
        teacher: With a teacher, its probability's share of the target (Hinton et al. 2015, arXiv:1503.02531, at
            temperature 1); the rest is the ground truth. The soft Dice loss does not have its minimum at such targets:
            it pushes a pixel to 1 where its target is above half of the Dice coefficient, else to 0, so only the
            cross-entropy teaches the probability itself (see :func:`petseg.losses.dice_loss`).
        features: Weight of the distance to the teacher's features (:class:`petseg.objective.Distillation`). The teacher
            then has to be a checkpoint, and is run on the augmented photos at every step; at 0 it is run on each photo
            once, before training.
    """

    bce: float = 0.5
    dice: float = 0.5
    dice_form: Literal["soft", "semimetric"] = "soft"
    epsilon: float = 1.0
    teacher: float = 0.5
    features: float = 0.0

    def __post_init__(self) -> None:
        _require(self.bce >= 0, "loss.bce", self.bce, "0 or more")
        _require(self.dice >= 0, "loss.dice", self.dice, "0 or more")
        _require(self.bce + self.dice > 0, "loss.bce + loss.dice", self.bce + self.dice, "above 0")
        _require(self.epsilon > 0, "loss.epsilon", self.epsilon, "above 0")
        _require(0 <= self.teacher <= 1, "loss.teacher", self.teacher, "between 0 and 1")
        _require(self.features >= 0, "loss.features", self.features, "0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). The published source names no optimizer: our choice.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay, on convolution weights only (not on BatchNorm or biases).
        clip: Gradient clipping: the largest norm of the whole gradient; longer ones are scaled down to it.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.clip > 0, "optimizer.clip", self.clip, "above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate schedule: a pure function of the step, so that a resumed run follows it exactly.

    Attributes:
        name: ``cosine-restarts`` (published: CosineAnnealingWarmRestarts, Loshchilov & Hutter 2017), ``one-cycle``
            (warm-up over the ``warmup`` share of the run, then cosine annealing to zero), ``cosine``, or ``constant``.
        restart_epochs: T_0, epochs up to the first restart. (The source gives none: our choice.)
        restart_factor: T_mult, the factor by which each period is longer than the one before.
        warmup: Share of a one-cycle run during which the learning rate rises.
    """

    name: Literal["cosine-restarts", "one-cycle", "cosine", "constant"] = "cosine-restarts"
    restart_epochs: int = 10
    restart_factor: int = 2
    warmup: float = 0.3

    def __post_init__(self) -> None:
        _require(self.restart_epochs >= 1, "schedule.restart_epochs", self.restart_epochs, "1 or more")
        _require(self.restart_factor >= 1, "schedule.restart_factor", self.restart_factor, "1 or more")
        _require(0 < self.warmup < 1, "schedule.warmup", self.warmup, "between 0 and 1, both excluded")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one training run. The defaults are the published recipe, as far as its source gives it.

    Attributes:
        epochs: Passes over the training photos.
        batch: Photos per step (mini-batch size), summed over all ranks.
        seed: Seed of the weights, the order of the photos and their augmentation.
        ema: Decay of the exponential moving average of the weights, which is evaluated and saved; 0: no averaging.
        amp: Precision. ``auto`` is bf16 where the hardware supports it, fp16 with a GradScaler on other GPUs, else
            fp32.
        early_stop: Epochs without a better validation IoU after which the run ends; 0: never. The schedule does not
            take it into account: a one-cycle run that stops early has not annealed to the end.
        compile: Whether to compile the network with ``torch.compile``, which takes a minute or more at the start. On
            our CPU it did not pay.
    """

    epochs: int = 30
    batch: int = 16
    seed: int = 0
    ema: float = 0.998
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    early_stop: int = 0
    compile: bool = False
    model: AttentionUNetConfig = field(default_factory=AttentionUNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.batch >= 2, "batch", self.batch, "2 or more (BatchNorm)")
        _require(0 <= self.ema < 1, "ema", self.ema, "at least 0 and below 1")
        _require(self.early_stop >= 0, "early_stop", self.early_stop, "0 or more")
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a signed 64-bit integer")


T = TypeVar("T")

#: Nesting levels of tables and lists; our settings have two, and the JSON of a checkpoint four.
MOST_LEVELS: Final = 30
_DEEP: Final = f"more than {MOST_LEVELS} levels of nested tables and lists; a setting is section.name = value"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Convert a config to nested plain values, for JSON and for comparison; tuples become lists, as in JSON."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def from_dict(cls: type[T], raw: Mapping[str, Any], where: str = "") -> T:
    """Build a config from nested plain values; the reverse of :func:`to_dict`.

    Args:
        cls: A config dataclass.
        raw: Its values; missing ones keep their defaults.
        where: Prefix of names in messages.

    Raises:
        UsageError: An unknown name (the message lists the known ones), a wrong type, or a value out of range.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in known:
            raise UsageError(f"unknown setting {where + name!r}; the settings are: {', '.join(sorted(known))}")
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where + name} is {value!r}; a table of settings is expected")
            values[name] = from_dict(hint, value, f"{where}{name}.")
        else:
            values[name] = _typed(hint, value, where + name)
    try:
        return cls(**values)
    except UsageError:  # already has the full name of the setting
        raise
    except ValueError as error:
        raise UsageError(f"{where}{error}") from error


def to_toml(config: TrainConfig, taught: bool) -> str:
    """Write the settings as TOML for :func:`load_toml`; settings without effect are commented out.

    Args:
        config: The run's settings.
        taught: Whether there is a teacher.
    """
    idle = unused_settings(config, taught)

    def line(name: str, value: Any, where: str = "") -> str:
        setting = f"{name} = {json.dumps(value)}"  # numbers, strings and lists of numbers are the same in JSON and TOML
        user = idle.get(where + name)
        return f"# {setting}  # no effect without {user}" if user else setting

    settings = to_dict(config)
    lines = [line(name, value) for name, value in settings.items() if not isinstance(value, dict)]
    for section, values in settings.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(line(name, value, f"{section}.") for name, value in values.items())]
    return "\n".join(lines) + "\n"


def load_toml(path: Path) -> dict[str, Any]:
    """Read the settings in a TOML file, for :func:`from_dict`.

    Raises:
        TrainingError: The file cannot be read, is not TOML, or nests tables and lists too deeply.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: not valid TOML ({error})") from error
    if is_deep(settings):
        raise TrainingError(f"{path}: {_DEEP}")
    return settings


def reject_unused(config: TrainConfig, start: TrainConfig, taught: bool) -> None:
    """Reject settings that were changed but have no effect.

    Args:
        config: The run's settings.
        start: The settings before the change: the defaults, or a recipe's.
        taught: Whether there is a teacher.

    Raises:
        UsageError: There is such a setting; the message says what it would need to have an effect.
    """
    for name, user in unused_settings(config, taught).items():
        value, before = (operator.attrgetter(name)(settings) for settings in (config, start))
        if value != before:
            raise UsageError(
                f"{name} is {value!r}, which has no effect without {user}; add that, or leave it at {before!r}"
            )


def unused_settings(config: TrainConfig, taught: bool) -> dict[str, str]:
    """Returns the settings that have no effect, each with what it would need to have one."""
    schedule, restarts = config.schedule, "schedule.name=cosine-restarts"
    seen = taught and config.loss.features > 0
    settings = (
        ("schedule.warmup", schedule.name == "one-cycle", "schedule.name=one-cycle"),
        ("schedule.restart_epochs", schedule.name == "cosine-restarts", restarts),
        ("schedule.restart_factor", schedule.name == "cosine-restarts", restarts),
        ("loss.dice_form", config.loss.dice > 0, "loss.dice above 0"),
        ("loss.epsilon", config.loss.dice > 0, "loss.dice above 0"),
        ("loss.teacher", taught, "--teacher FILE"),
        ("loss.features", taught, "--teacher FILE"),
        ("augment.mix", seen, "--teacher FILE and loss.features above 0"),
        (
            "augment.mix_until",
            seen and config.augment.mix > 0,
            "--teacher FILE, and loss.features and augment.mix above 0",
        ),
    )
    return {name: user for name, used, user in settings if not used}


def is_deep(values: Any) -> bool:
    """Whether plain values are nested so deeply that a recursive function could overflow the stack."""
    level = [values]
    for _ in range(MOST_LEVELS):
        nested = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in nested for inner in (value.values() if isinstance(value, dict) else value)]
    return bool(level)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings, setting by setting; ``over`` takes precedence. Neither argument is changed."""
    merged = {name: merge(value, {}) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = (
            merge(below if isinstance(below, Mapping) else {}, value) if isinstance(value, Mapping) else value
        )
    return merged


def override(raw: dict[str, Any], assignment: str) -> None:
    """Apply one ``section.name=value`` (the value as TOML or as a bare word) to nested settings, in place.

    Raises:
        UsageError: The text does not have that form, or nests too deeply.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment!r}: NAME=VALUE is expected, for example optimizer.lr=0.002")
    *sections, name = key.strip().split(".")
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except RecursionError as error:
        raise UsageError(f"--set {assignment[:60]!r}: {_DEEP}") from error
    except ValueError as error:  # more digits than Python reads
        raise UsageError(f"--set {assignment[:60]!r}: {error}") from error
    if len(sections) >= MOST_LEVELS or is_deep(value):
        raise UsageError(f"--set {assignment[:60]!r}: {_DEEP}")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise UsageError(f"--set {assignment!r}: {section!r} is a setting, not a section")
    raw[name] = value


def _typed(hint: Any, value: Any, name: str) -> Any:
    if typing.get_origin(hint) is Union:  # X | Literal["word", ...]
        kind, words = typing.get_args(hint)
        if isinstance(value, str) and value not in typing.get_args(words):
            expected = " or ".join((kind.__name__, *typing.get_args(words)))
            raise UsageError(f"{name} is {value!r}; {expected} is expected")
        hint = words if isinstance(value, str) else kind
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UsageError(f"{name} is {value!r}; one of {', '.join(map(str, choices))} is expected")
        return value
    if typing.get_origin(hint) is tuple:  # tuple[X, ...]
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} is {value!r}; a list is expected")
        return tuple(_typed(typing.get_args(hint)[0], item, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is {value}; a finite number is expected")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{name} is {value!r}; {hint.__name__} is expected")
    return value


def _as_float(number: int) -> float:
    """Convert a whole number; infinity if it is beyond the range of floats."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {expected}")
