"""What people type to train and evaluate: options in, calls to the modules beside, tables and files out."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from petseg_runtime.cli.text import BACKEND, HELP, PATH, UNIT, parse_size
from petseg_runtime.errors import MissingExtra, OutputError, UsageError
from petseg_runtime.signals import EXITS
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg.config import TrainConfig
    from petseg.data import Pair, Split
    from petseg.evaluate import Evaluation, OpenedModel
    from petseg.log import Row
    from petseg.observers import Observer
    from petseg.run_state import RunState
    from petseg.train import Trainer
    from petseg_runtime.errors import DataError

__all__ = ["data", "evaluate", "train"]


def _progress(quiet: bool) -> Progress:
    """A progress line on stderr; silent where stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `petseg train` is to do with a run's settings; as its options say it.

    Attributes:
        root: The data folder.
        output: Where everything goes.
        recipe: From which the settings came, if from one.
        device: What computes: auto, cpu, cuda or cuda:N.
        init: A checkpoint to start from.
        teacher: A model to learn from.
        resume: Whether to go on with the run in ``output``.
        tensorboard: Whether to write curves and pictures for TensorBoard.
        as_json: Whether the result is printed as JSON.
        quiet: Whether nothing but errors is printed.
    """

    root: Path
    output: Path
    recipe: str | None
    device: str
    init: Path | None
    teacher: Path | None
    resume: bool
    tensorboard: bool
    as_json: bool
    quiet: bool


@click.command()
@click.option("--data", "root", type=PATH, help="Data folder (see `petseg data check`).  [required]")
@click.option("--output", type=PATH, help="Where checkpoints, log and pictures go.  [required]")
@click.option(
    "--recipe",
    is_flag=False,
    flag_value="",
    callback=lambda ctx, option, value: _known_recipe(ctx, value),
    metavar="NAME",
    help="Settings by name; without a name, the list of them.",
)
@click.option("--config", "config_file", type=PATH, help="Settings as TOML; they override the recipe, options both.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="One setting, like optimizer.lr=0.002; see --settings.",
)
@click.option("--settings", "show", is_flag=True, help="Print the run's settings as TOML for --config; train nothing.")
@click.option("--epochs", type=int, help="Passes over the data.")
@click.option("--batch", type=int, help="Photos per step.")
@click.option("--size", metavar="HxW", help="Training size, multiples of 16 (192 means 192x192).")
@click.option("--width", type=int, help="Channels of the first level: 64 published, 16 edge.")
@click.option("--seed", type=int, help="Of weights, order and augmentation.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--init", type=PATH, help="Start from this checkpoint's weights, as far as they fit.")
@click.option("--teacher", type=PATH, help="Learn from this model, too (loss.teacher, loss.features: how much).")
@click.option("--resume", is_flag=True, help="Go on with the run in --output.")
@click.option("--tensorboard", is_flag=True, help="Curves and pictures for TensorBoard in --output/tensorboard.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the recipes, as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def train(
    root: Path | None,
    output: Path | None,
    recipe: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    show: bool,
    epochs: int | None,
    batch: int | None,
    size: str | None,
    width: int | None,
    seed: int | None,
    device: str,
    init: Path | None,
    teacher: Path | None,
    resume: bool,
    tensorboard: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Train the attention U-Net; the defaults are the published recipe.

    Keeps best.safetensors (to evaluate and export), last.safetensors (to --resume), log.csv, curves.png,
    predictions.png and run.json in --output. With several GPUs: torchrun --nproc-per-node N -m petseg.cli train ...

    Exit code 3: done, but without photos that could not be used (data.on_bad=skip); they are named. 130, 143, 129:
    stopped by Ctrl-C, SIGTERM or SIGHUP, to be resumed.
    """
    if recipe == "":
        _list_recipes(as_json)
        return 0
    if show and as_json:
        raise UsageError("--settings prints TOML: leave out --json")
    for option, path in (("--data", root), ("--output", output)):
        if path is None and not show:
            raise click.MissingParameter(ctx=click.get_current_context(), param_hint=option, param_type="option")

    from petseg.config import refuse_idle, to_toml

    short = {"epochs": epochs, "batch": batch, "seed": seed, "model.width": width}
    config = _train_config(recipe, config_file, short, size, settings)
    if not resume:  # an older version, which did not look, may have begun the run
        refuse_idle(config, _train_config(recipe), taught=teacher is not None)
    if show:
        click.echo(to_toml(config, taught=teacher is not None), nl=False)
        return 0
    assert root is not None
    assert output is not None
    asked = Asked(
        root=root,
        output=output,
        recipe=recipe,
        device=device,
        init=init,
        teacher=teacher,
        resume=resume,
        tensorboard=tensorboard,
        as_json=as_json,
        quiet=quiet,
    )
    return _train(config, asked)


def _train(config: TrainConfig, asked: Asked) -> int:
    """Train with settings that are complete; returns the exit code."""
    from petseg.distributed import join, local_device
    from petseg.record import commit
    from petseg.train import Trainer
    from petseg_runtime.errors import EXIT_PARTIAL, NonFiniteLoss

    origin = {"command": shlex.join(["petseg", *sys.argv[1:]]), "commit": commit()}
    device = local_device(asked.device)
    _check_writable(asked.output)  # before an epoch, which may take hours, not after it
    with join(device) as ranks:
        hushed = asked.quiet or not ranks.first
        with _progress(hushed) as progress, _board(config, asked, ranks.first) as board:
            observer = _observer(config.epochs, progress, hushed, ranks.first)
            trainer = Trainer(
                config,
                asked.root,
                asked.output,
                device=device,
                init=asked.init,
                teacher=asked.teacher,
                resume=asked.resume,
                observer=_both(observer, board),
                provenance={**origin, **({"recipe": asked.recipe} if asked.recipe else {})},
                ranks=ranks,
            )
            try:
                best = trainer.fit()
            except KeyboardInterrupt:
                if ranks.first:
                    click.echo("petseg: interrupted", err=True)
                return EXITS[trainer.stopped_by]
            except NonFiniteLoss as error:
                if ranks.first:
                    raise
                return error.exit_code  # the first process says it for all
    if not ranks.first:
        return 0  # torchrun would end the first one, which still has pictures to make, for any other
    _finish(trainer, best, asked)
    return EXIT_PARTIAL if trainer.photos.bad else 0


def _known_recipe(ctx: click.Context, name: str | None) -> str | None:
    """The name, if there is such a recipe, or an empty one."""
    from petseg import recipes

    if not name or name in recipes.names():
        return name
    listed = "\n".join(_recipe_lines())
    raise click.BadParameter(f"there is no recipe {name!r}; there are:\n{listed}", ctx, param_hint="--recipe")


def _recipe_lines() -> list[str]:
    from petseg import recipes

    return [f"  {name:<10} {recipes.describe(name)}" for name in recipes.names()]


def _list_recipes(as_json: bool) -> None:
    from petseg import recipes

    if as_json:
        each = [{"name": n, "about": recipes.describe(n), "settings": recipes.load(n)} for n in recipes.names()]
        click.echo(json.dumps({"schema_version": 1, "recipes": each}))
    else:
        click.echo("\n".join(_recipe_lines()))


def _train_config(
    recipe: str | None,
    config_file: Path | None = None,
    short: Mapping[str, Any] = MappingProxyType({}),
    size: str | None = None,
    settings: Sequence[str] = (),
) -> TrainConfig:
    """Recipe, file, options, --set: the later has the last word.

    Raises:
        UsageError: There is no such setting, or one has a value that it cannot have.
        TrainingError: The file cannot be read.
    """
    from petseg import recipes
    from petseg.config import TrainConfig, from_dict, load_toml, merge, override

    raw = merge(recipes.load(recipe) if recipe else {}, load_toml(config_file) if config_file else {})
    for key, value in short.items():
        if value is not None:
            override(raw, f"{key}={value}")
    if size is not None:
        height, wide = parse_size(size)
        override(raw, f"data.height={height}")
        override(raw, f"data.width={wide}")
    for assignment in settings:
        override(raw, assignment)
    return from_dict(TrainConfig, raw)


def _finish(trainer: Trainer, best: Path, asked: Asked) -> None:
    """The record, the pictures, and what is printed at the end."""
    from petseg.log import LOG
    from petseg.record import RUN, write_record

    write_record(trainer)  # first: a picture that cannot be made is no reason to lose it
    drawn = _draw(trainer, best)
    row = trainer.best
    if asked.as_json:
        click.echo(json.dumps({"schema_version": 1, "checkpoint": str(best), "best": row.as_dict()}))
    elif not asked.quiet:
        click.echo(f"{best}: validation IoU {row.val_iou:.4f} at threshold {row.val_threshold:.2f}")
        click.echo(f"{asked.output / LOG}; beside it {', '.join((RUN, *drawn))}")


def _draw(trainer: Trainer, best: Path) -> list[str]:
    """Make the pictures of a run; returns the names of those that could be made. The others are named on stderr."""
    from petseg import plots
    from petseg_runtime.errors import PetsegError

    output, drawn = trainer.output, []
    pictures: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: plots.curves(trainer.state.history, path),
        "predictions.png": lambda path: plots.predictions(best, trainer.photos.good_val[:6], path),
    }
    for name, draw in pictures.items():
        try:
            draw(output / name)
        except OSError as error:
            click.echo(f"petseg: {shown(output / name)}: cannot be written ({error.strerror or error})", err=True)
        except PetsegError as error:
            click.echo(f"petseg: {shown(output / name)}: cannot be made ({shown(error)})", err=True)
        else:
            drawn.append(name)
    return drawn


@contextlib.contextmanager
def _board(config: TrainConfig, asked: Asked, first: bool) -> Iterator[Observer | None]:
    """What writes for TensorBoard, if that is asked for, in the first of several processes."""
    if not (asked.tensorboard and first):
        yield None
        return
    from petseg.tensorboard import TensorBoard  # tensorboard takes seconds to import

    board = TensorBoard(asked.output / "tensorboard", config.data.height, config.data.width)
    try:
        yield board
    finally:
        board.close()


def _both(observer: Observer, board: Observer | None) -> Observer:
    from petseg.observers import Observers

    return Observers(observer, board) if board else observer


def _observer(epochs: int, progress: Progress, quiet: bool, first: bool) -> Observer:
    """Prints what happens to stderr; if quiet, only what is missing from the result."""
    from petseg.observers import Observer

    class Printer(Observer):
        def begin(self, per_epoch: int, batch: int) -> None:
            self.batch = batch
            self.task = progress.add_task("training", total=epochs * per_epoch, detail="", visible=False)

        def started(self, message: str) -> None:
            if not quiet:
                # A file's name is neither broken into lines nor read as markup.
                self._print(message)

        def _print(self, message: str) -> None:
            progress.console.print(shown(message), highlight=False, markup=False, emoji=False, soft_wrap=True)

        def left_out(self, message: str) -> None:
            if first:
                self._print(message)

        def step(self, state: RunState, loss: float, lr: float) -> None:
            rate = state.steps_summed * self.batch / max(state.seconds, 1e-9)
            detail = f"loss {loss:.3f}  {rate:.0f} images/s"
            progress.update(self.task, completed=state.step, detail=detail, visible=True)

        def epoch(self, row: Row) -> None:
            if not quiet:
                progress.console.print(
                    f"epoch {row.epoch}/{epochs}  loss {row.loss:.4f}  val IoU {row.val_iou:.4f}  "
                    f"Dice {row.val_dice:.4f}  {row.images_per_s:.0f} images/s",
                    highlight=False,
                )

    return Printer()


@click.command()
@click.argument("model", type=PATH)
@click.option("--data", "root", type=PATH, required=True, help="Labelled data folder.")
@click.option("--split", type=click.Choice(["test", "val", "train", "trainval"]), default="test", show_default=True)
@click.option("--threshold", type=UNIT, help="Pet from this probability on, 0 to 1.  [default: the model's own]")
@click.option(
    "--backend", type=BACKEND, default="auto", show_default=True, help=f"{HELP['backend']} Of exported files."
)
@click.option(
    "--device", default="auto", show_default=True, help=f"{HELP['device']} Of a checkpoint: cpu, cuda or cuda:N."
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Photos per call.")
@click.option("--val-fraction", type=UNIT, help="Share of trainval that is val.  [default: the run's own, or 0.05]")
@click.option("--split-seed", type=int, help="Decides which photos are val.  [default: the run's own, or 0]")
@click.option("--output", type=PATH, help="Folder for evaluation.json, worst.png and per-photo images.csv.")
@click.option("--report", type=PATH, help="Folder for report.html, one page that explains the result, and report.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def evaluate(
    model: Path,
    root: Path,
    split: str,
    threshold: float | None,
    backend: str,
    device: str,
    batch: int,
    val_fraction: float | None,
    split_seed: int | None,
    output: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure MODEL, a checkpoint or an exported file, on a labelled split.

    Pixels are counted at each mask's own resolution and added up over the split. The headline counts the trimap's
    border as background; the other two readings are below it. With --report, a photo that cannot be read is named and
    left out, and the exit code is 3; without it, it ends the measurement.

    With --split val or train, the photos are those that the model's own run validated or trained on. An exported file
    of an older version does not say which those were, and can only confirm that a split given here was its own. Where
    the data folder lists its validation photos in val.txt, val is these, and --val-fraction is wrong usage.

    An exported file needs no PyTorch, a checkpoint does; --report and worst.png need matplotlib. The extra `train` has
    both.
    """
    from petseg.data import Split
    from petseg.evaluate import evaluate as measure
    from petseg.evaluate import open_model
    from petseg.memory import enough_memory
    from petseg_runtime.errors import EXIT_PARTIAL

    failed: list[tuple[str, str]] = []  # name and reason

    def leave_out(pair: Pair, error: DataError) -> None:
        failed.append((pair.name, str(error)))

    _check_writable(output, report)  # before minutes of measuring, not after them
    if report:
        _check_drawable()
    written = []
    with open_model(model, device, backend) as opened, _progress(quiet) as progress:
        pairs, val_fraction, split_seed = _measured_pairs(root, Split(split), opened, val_fraction, split_seed)
        task = progress.add_task("measuring", total=len(pairs), detail="")
        with enough_memory(f"use a smaller --batch than {batch}"):
            result = measure(
                opened.run,
                pairs,
                opened.height,
                opened.width,
                batch=batch,
                watch=lambda done: progress.update(task, completed=done),
                failed=leave_out if report else None,
            )
        cut = opened.threshold if threshold is None else threshold
        record = {**result.summary(cut), "model": opened.describe(), "split": split}
        if failed:
            record["photos_failed"] = [name for name, _ in failed]
        kept = set(result.names)
        measured = [pair for pair in pairs if pair.name in kept]
        if output:
            written.append(f"{output}: {', '.join(_write_output(result, record, opened, measured, output))}")
        if report:
            from petseg import report as pages  # matplotlib takes a second to import

            source = pages.Source(root, Split(split), measured, failed, val_fraction, split_seed)
            pages.write(result, record, opened, source, model, report)
            written.append(f"{report}: report.html, report.json")
    for _, reason in failed:
        click.echo(f"petseg: {shown(reason)}; left out", err=True)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        _print_metrics(record)
        click.echo("".join(f"{line}\n" for line in written), nl=False)
    return EXIT_PARTIAL if failed else 0


def _measured_pairs(
    root: Path, split: Split, model: OpenedModel, val_fraction: float | None, split_seed: int | None
) -> tuple[list[Pair], float | None, int | None]:
    """The photos of a split, and the share of trainval and the seed that divide it into train and val.

    Both are as asked, or else as in the run that made the model; they are None where they divide nothing. A line on
    stderr says so where val may hold photos that the model was trained on.

    Raises:
        UsageError: They were asked for, and val.txt divides.
    """
    from petseg.data import SPLIT_SEED, VAL_FRACTION, VAL_LISTING, Split, find, listed_validation
    from petseg.evaluate import listed_split, split_of

    if split not in (Split.TRAIN, Split.VAL):
        return find(root, split), None, None
    fraction, seed = None, None
    if (val_fraction, split_seed) == (None, None) and (listed := listed_split(model.provenance, root)):
        return listed[split], None, None
    if listed_validation(root) is None:
        own = split_of(model.provenance) or (VAL_FRACTION, SPLIT_SEED)
        fraction = own[0] if val_fraction is None else val_fraction
        seed = own[1] if split_seed is None else split_seed
    elif (val_fraction, split_seed) != (None, None):
        raise UsageError(f"{root}: {VAL_LISTING} says which photos are val: leave out --val-fraction and --split-seed")
    train, val = (
        find(root, part, val_fraction=fraction or VAL_FRACTION, seed=seed or SPLIT_SEED)
        for part in (Split.TRAIN, Split.VAL)
    )
    if differs := _difference(model, train, val, fraction, seed):
        click.echo(f"petseg: {differs}: photos that it was trained on may be among val", err=True)
    return (train if split is Split.TRAIN else val), fraction, seed


def _difference(
    model: OpenedModel, train: Sequence[Pair], val: Sequence[Pair], fraction: float | None, seed: int | None
) -> str | None:
    """How train and val differ from those of the model's own run, in words; None if they do not, or it does not say."""
    from petseg.data import VAL_LISTING
    from petseg.evaluate import is_split_of, split_of

    own = split_of(model.provenance)
    if fraction is not None and own and own != (fraction, seed):
        return f"the model was trained with {own[0]:g} of trainval as val by seed {own[1]}, not {fraction:g} by {seed}"
    if is_split_of(model.provenance, train, val) is False:
        which = f"as {VAL_LISTING} lists it" if fraction is None else f"{fraction:g} of trainval by seed {seed}"
        return f"val, {which}, is not what the model was validated on"
    return None


def _check_drawable() -> None:
    """Raises MissingExtra where matplotlib is not installed; importing it takes a second."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"`petseg evaluate --report` needs {error.name} for its charts, which is not installed: pip install "
            f"{error.name}; or leave out --report"
        ) from error


def _write_output(
    result: Evaluation, record: dict[str, Any], model: OpenedModel, pairs: Sequence[Pair], folder: Path
) -> list[str]:
    """Write what --output is for; returns the files' names. Without matplotlib the picture is not drawn, and told of.

    Raises:
        OutputError: The folder cannot be written to.
    """
    from petseg.evaluate import write_evaluation

    write_evaluation(result, record, folder)
    names, picture = ["evaluation.json", "images.csv"], "worst.png"
    try:
        from petseg import plots  # matplotlib takes a second to import
    except ModuleNotFoundError as error:
        said = f"not drawn, which needs {error.name}: pip install {error.name}"
        click.echo(f"petseg: {shown(folder / picture)}: {said}", err=True)
        return names
    try:
        plots.worst(result, model, pairs, record["threshold"], folder / picture)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    return [*names, picture]


def _check_writable(*folders: Path | None) -> None:
    """Raises OutputError where a folder, or the nearest one above it that is there, is no folder or not ours."""
    for folder in filter(None, folders):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise OutputError(f"{folder}: cannot be written to ({there} is not a folder)")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: cannot be written to ({there}: permission denied)")


def _print_metrics(record: dict[str, Any]) -> None:
    readings = record["readings"]
    # Ignoring the border leaves as many pixels where there is none, as in masks of black and white.
    bordered = sum(readings["ignored"]["pixels"].values()) < sum(readings["background"]["pixels"].values())
    table = Table(title=f"{record['photos']} photos, threshold {record['threshold']:.3f}")
    table.add_column("border counts as" if bordered else "")
    names = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for border, values in readings.items() if bordered else [("no border", record)]:
        table.add_row(border, *("-" if values[name] is None else f"{values[name]:.4f}" for name in names))
    Console().print(table)
    if not bordered:
        click.echo("the masks have no border: every reading of it gives these figures")
    if record["photos_without_pet"]:
        without = ", ".join(map(shown, record["photos_without_pet"]))
        click.echo(f"masks without any pet, counted all the same: {without}")


@click.group()
def data() -> None:
    """Download or check a data set."""


@data.command()
@click.argument("folder", type=PATH)
def download(folder: Path) -> int:
    """Download the Oxford-IIIT Pet data set (0.8 GB) into FOLDER, with its checksums verified.

    Photos and masks are CC BY-SA 4.0; cite Parkhi et al., "Cats and Dogs", CVPR 2012.
    """
    from petseg.data import download as fetch

    fetch(folder)
    click.echo(f"{folder / 'oxford-iiit-pet'}: ready; `petseg data check {folder}` looks at every file")
    return 0


@data.command()
@click.argument("folder", type=PATH)
@click.option("--split", type=click.Choice(["all", "trainval", "test"]), default="all", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only the exit code.")
def check(folder: Path, split: str, as_json: bool, quiet: bool) -> int:
    """Open every photo and mask of FOLDER and name what is wrong. Exit code 0: usable; 8: not.

    Masks without a pet, and files that are not used, are named, and leave it usable.

    Photos are counted for each part that the data set lists itself: test, and trainval, or train and val where there is
    a val.txt.
    """
    from petseg.data import Split, find_listed, find_unused, listed_validation
    from petseg.data import check as look
    from petseg_runtime.errors import DataError

    halves = [Split.TRAINVAL] if listed_validation(folder) is None else [Split.TRAIN, Split.VAL]
    parts = {"all": [*halves, Split.TEST], "trainval": halves, "test": [Split.TEST]}[split]
    listed = find_listed(folder, parts)
    pairs = [pair for part in listed.values() for pair in part]
    with _progress(quiet) as progress:
        task = progress.add_task("checking", total=len(pairs), detail="")
        report = look(pairs, watch=lambda done: progress.update(task, completed=done))
    findings = {
        "missing": report.missing,
        "unreadable": report.unreadable,
        "wrong_size": report.wrong_size,
        "empty": report.empty,
        "unused": [str(path) for path in find_unused(folder)],
    }
    splits = {str(name): len(part) for name, part in listed.items()}
    if as_json:
        about = {"pairs": report.pairs, "splits": splits, "usable": report.usable}
        click.echo(json.dumps({"schema_version": 1, **about, **findings}))
    elif not quiet:
        for kind, names in findings.items():
            for name in names:
                click.echo(f"{kind.replace('_', ' ')}: {shown(name)}")
        counted = ", ".join(f"{len(names)} {kind.replace('_', ' ')}" for kind, names in findings.items())
        click.echo(", ".join(f"{number} pairs in {name}" for name, number in splits.items()))
        click.echo(f"{report.pairs} pairs: {counted}: {'usable' if report.usable else 'not usable'}")
    return 0 if report.usable else DataError.exit_code
