"""``petseg train``: settings from recipe, file and options; a training run; its record and its plots."""

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
from rich.progress import Progress

from petseg.commands.console import check_writable, progress_line
from petseg_runtime.cli.text import PATH, parse_size
from petseg_runtime.errors import PetsegError, UsageError
from petseg_runtime.signals import EXITS
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg.config import TrainConfig
    from petseg.log import Row
    from petseg.observers import Observer
    from petseg.run_state import RunState
    from petseg.train import Trainer

__all__ = ["train"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``petseg train`` that are not settings of the run.

    Attributes:
        root: The data folder.
        output: The folder for everything that is written.
        recipe: The recipe that the settings came from, if any.
        device: auto, cpu, cuda or cuda:N.
        init: A checkpoint to start from.
        teacher: A model to learn from.
        resume: Whether to resume the run in ``output``.
        tensorboard: Whether to write scalars and images for TensorBoard.
        as_json: Whether to print the result as JSON.
        quiet: Whether to print only errors.
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


class RankedCommand(click.Command):
    """A command whose error messages begin with the rank if torchrun started several processes."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click; parsing the options may fail."""
        with _ranked():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As click."""
        with _ranked():
            return super().invoke(ctx)


@contextlib.contextmanager
def _ranked() -> Iterator[None]:
    """Prefix errors with the rank, because all processes print theirs, which may be the same."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield
        return
    rank = f"rank {os.environ['RANK']}"
    try:
        yield
    except PetsegError as error:
        error.args = (f"{rank}: {error}",)
        raise
    except click.UsageError as error:
        raise click.UsageError(f"{rank}: {error.format_message()}", error.ctx) from error


@click.command(cls=RankedCommand)
@click.option("--data", "root", type=PATH, help="Data folder (see `petseg data check`).  [required]")
@click.option("--output", type=PATH, help="Folder for checkpoints, log and plots.  [required]")
@click.option(
    "--recipe",
    is_flag=False,
    flag_value="",
    callback=lambda ctx, option, value: _known_recipe(ctx, value),
    metavar="NAME",
    help="Use a named recipe; without NAME, list the recipes.",
)
@click.option(
    "--config",
    "config_file",
    type=PATH,
    help="TOML file with settings; takes precedence over --recipe, other options over both.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change one setting, like optimizer.lr=0.002 (repeatable); --settings lists them.",
)
@click.option("--settings", "show", is_flag=True, help="Print the run's settings as TOML for --config, and exit.")
@click.option("--epochs", type=int, help="Passes over the training photos.")
@click.option("--batch", type=int, help="Photos per step (mini-batch size), in all processes together.")
@click.option("--size", metavar="HxW", help="Training size, multiples of 16 (192 means 192x192).")
@click.option("--width", type=int, help="Channels of the network's first level: 64 published, 16 edge.")
@click.option("--seed", type=int, help="Seed of weights, photo order and augmentation.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--init", type=PATH, help="Start from this checkpoint's weights, as far as they fit.")
@click.option("--teacher", type=PATH, help="Also learn from this model (loss.teacher and loss.features set how much).")
@click.option("--resume", is_flag=True, help="Resume the run in --output.")
@click.option("--tensorboard", is_flag=True, help="Write scalars and images for TensorBoard to --output/tensorboard.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the recipes, to stdout as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
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

    Writes best.safetensors (to evaluate and export), last.safetensors (for --resume), log.csv, curves.png,
    predictions.png and run.json to --output. With several GPUs: torchrun --nproc-per-node N -m petseg.cli train ...

    Exit code 3: done, but some photos could not be used and were excluded (data.on_bad=skip); they are named. 130, 143,
    129: stopped by Ctrl-C, SIGTERM or SIGHUP; resume with --resume.
    """
    if recipe == "":
        _list_recipes(as_json)
        return 0
    if show and as_json:
        raise UsageError("--settings prints TOML; leave out --json")
    for option, path in (("--data", root), ("--output", output)):
        if path is None and not show:
            raise click.MissingParameter(ctx=click.get_current_context(), param_hint=option, param_type="option")
    Path.cwd()  # if it was deleted, importing torch would end the process, with another message

    from petseg.config import reject_unused, to_toml

    short = {"epochs": epochs, "batch": batch, "seed": seed, "model.width": width}
    config = _train_config(recipe, config_file, short, size, settings)
    reject_unused(config, _train_config(recipe), taught=teacher is not None)
    if show:
        click.echo(to_toml(config, taught=teacher is not None), nl=False)
        return 0
    assert root is not None
    assert output is not None
    options = Options(
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
    return _train(config, options)


def _train(config: TrainConfig, options: Options) -> int:
    """Train with complete settings; returns the exit code."""
    from petseg.distributed import join, local_device
    from petseg.observers import Observers
    from petseg.record import commit
    from petseg.train import Trainer
    from petseg_runtime.errors import EXIT_PARTIAL, FirstRankFailed, NonFiniteLoss

    origin = {"command": shlex.join(["petseg", *sys.argv[1:]]), "commit": commit()}
    device = local_device(options.device)
    check_writable(options.output)  # before an epoch, which may take hours
    with join(device) as ranks:
        quiet = options.quiet or not ranks.first
        with progress_line(quiet) as progress, _board(config, options, ranks.first) as board:
            observer = _observer(config.epochs, progress, quiet, ranks.first)
            trainer = Trainer(
                config,
                options.root,
                options.output,
                device=device,
                init=options.init,
                teacher=options.teacher,
                resume=options.resume,
                observer=Observers(observer, board) if board else observer,
                provenance={**origin, **({"recipe": options.recipe} if options.recipe else {})},
                ranks=ranks,
            )
            try:
                best = trainer.train()
            except KeyboardInterrupt:
                if ranks.first:
                    click.echo("petseg: interrupted", err=True)
                return EXITS[trainer.stopped_by]
            except (FirstRankFailed, NonFiniteLoss):
                # Rank 0 raises for all: it has failed, or found the same loss, which is summed over all ranks. At the
                # first nonzero exit code, torchrun would end it, perhaps before it has said so.
                if ranks.first:
                    raise
                return 0
    if not ranks.first:
        return 0  # with another code, torchrun would end rank 0, which still has plots to make
    _finish(trainer, best, options)
    return EXIT_PARTIAL if trainer.photos.bad else 0


def _known_recipe(ctx: click.Context, name: str | None) -> str | None:
    """Returns the name, if it is empty or there is such a recipe.

    Raises:
        click.BadParameter: There is none; the message lists the recipes.
    """
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
    """Combine recipe, file, options and --set; later ones take precedence.

    Raises:
        UsageError: A setting is unknown, or its value is invalid.
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


def _finish(trainer: Trainer, best: Path, options: Options) -> None:
    """Write the record, draw the plots, and print the result."""
    from petseg.log import LOG
    from petseg.record import RUN, write_record

    try:
        write_record(trainer)  # first, so that it is not lost if a plot fails
        drawn = _draw(trainer, best)
        row = trainer.best
    finally:
        trainer.unlock()
    if options.as_json:
        click.echo(json.dumps({"schema_version": 1, "checkpoint": str(best), "best": row.as_dict()}))
    elif not options.quiet:
        click.echo(f"{best}: validation IoU {row.val_iou:.4f} at threshold {row.val_threshold:.2f}")
        click.echo(f"{options.output / LOG}; beside it {', '.join((RUN, *drawn))}")


def _draw(trainer: Trainer, best: Path) -> list[str]:
    """Draw the plots of a run; returns the names of those that were written. Failures are reported on stderr."""
    from petseg import plots
    from petseg.run_state import CURVES, PREDICTIONS
    from petseg_runtime.errors import PetsegError

    output, drawn = trainer.output, []
    pictures: dict[str, Callable[[Path], None]] = {
        CURVES: lambda path: plots.curves(trainer.state.history, path),
        PREDICTIONS: lambda path: plots.predictions(best, trainer.photos.good_val[:6], path),
    }
    for name, draw in pictures.items():
        try:
            draw(output / name)
        except OSError as error:
            click.echo(f"petseg: {shown(output / name)}: cannot be written ({error.strerror or error})", err=True)
        except PetsegError as error:
            click.echo(f"petseg: {shown(output / name)}: cannot be drawn ({shown(error)})", err=True)
        else:
            drawn.append(name)
    return drawn


@contextlib.contextmanager
def _board(config: TrainConfig, options: Options, first: bool) -> Iterator[Observer | None]:
    """Yields the TensorBoard observer, if requested, on rank 0."""
    if not (options.tensorboard and first):
        yield None
        return
    from petseg.tensorboard import TensorBoard  # tensorboard takes seconds to import

    board = TensorBoard(options.output / "tensorboard", config.data.height, config.data.width)
    try:
        yield board
    finally:
        board.close()


def _observer(epochs: int, progress: Progress, quiet: bool, first: bool) -> Observer:
    """Returns an observer that prints to stderr; with ``quiet``, only which photos were excluded."""
    from petseg.observers import Observer

    class Printer(Observer):
        def begin(self, per_epoch: int, batch: int) -> None:
            self.batch = batch
            self.task = progress.add_task("training", total=epochs * per_epoch, detail="", visible=False)

        def started(self, message: str) -> None:
            if not quiet:
                # File names must be neither wrapped nor read as markup.
                self._print(message)

        def _print(self, message: str) -> None:
            progress.console.print(shown(message), highlight=False, markup=False, emoji=False, soft_wrap=True)

        def excluded(self, message: str) -> None:
            if first:
                self._print(message)

        def step(self, state: RunState, loss: float, lr: float) -> None:
            rate = state.steps_summed * self.batch / max(state.seconds, 1e-9)
            detail = f"loss {loss:.3f}  {rate:.0f} photos/s"
            progress.update(self.task, completed=state.step, detail=detail, visible=True)

        def epoch(self, row: Row) -> None:
            if not quiet:
                progress.console.print(
                    f"epoch {row.epoch}/{epochs}  loss {row.loss:.4f}  val IoU {row.val_iou:.4f}  "
                    f"Dice {row.val_dice:.4f}  {row.images_per_s:.0f} photos/s",
                    highlight=False,
                )

    return Printer()
