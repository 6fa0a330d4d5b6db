"""``petseg evaluate``: a model on labelled photos, as a table, files and a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from petseg.commands.console import check_writable, progress_line
from petseg_runtime.cli.text import BACKEND, HELP, PATH, UNIT
from petseg_runtime.errors import DataError, MissingExtra, OutputError, UsageError
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg.data import Pair, Split
    from petseg.evaluate import Evaluation, OpenedModel

__all__ = ["evaluate"]


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
@click.option(
    "--without-doubtful",
    is_flag=True,
    help="Of what `petseg infer` shows: without regions in which the model is sure of no pixel.  [default: all that it "
    "says]",
)
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
    without_doubtful: bool,
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
    from petseg.evaluate import as_shown, open_model
    from petseg_runtime.errors import EXIT_PARTIAL

    check_writable(output, report)  # before minutes of measuring, not after them
    if report:
        _check_drawable()
    failed: list[tuple[str, str]] | None = [] if report else None  # name and reason
    with open_model(model, device, backend) as opened, progress_line(quiet) as progress:
        pairs, val_fraction, split_seed = _measured_pairs(root, Split(split), opened, val_fraction, split_seed)
        if without_doubtful:
            opened = dataclasses.replace(opened, run=as_shown(opened.run))
        result = _measured(opened, pairs, batch, progress, failed)
        cut = opened.threshold if threshold is None else threshold
        record = {**result.summary(cut), "model": opened.describe(), "split": split}
        record["doubtful"] = "left out" if without_doubtful else "kept"
        if threshold is None and (lower := _lower_cut(record, opened)) is not None:
            record["cutout"] = result.at_threshold(lower)
        if failed:
            record["photos_failed"] = [name for name, _ in failed]
        kept = set(result.names)
        measured = [pair for pair in pairs if pair.name in kept]
        written = []
        if output:
            written.append(f"{output}: {', '.join(_write_output(result, record, opened, measured, output))}")
        if report:
            from petseg import report as pages  # matplotlib takes a second to import

            source = pages.Source(root, Split(split), measured, failed or [], val_fraction, split_seed)
            pages.write(result, record, opened, source, model, report)
            written.append(f"{report}: report.html, report.json")
    for _, reason in failed or []:
        click.echo(f"petseg: {shown(reason)}; left out", err=True)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        _print_metrics(record)
        click.echo("".join(f"{line}\n" for line in written), nl=False)
    return EXIT_PARTIAL if failed else 0


def _measured(
    model: OpenedModel, pairs: Sequence[Pair], batch: int, progress: Progress, failed: list[tuple[str, str]] | None
) -> Evaluation:
    """Measure a model on photos, with a line of progress.

    Args:
        model: The model.
        pairs: The photos.
        batch: Photos per call.
        progress: The line.
        failed: Takes the name of each photo that cannot be read, and why; None: the first one ends it.
    """
    from petseg.evaluate import evaluate as measure
    from petseg.memory import enough_memory

    task = progress.add_task("measuring", total=len(pairs), detail="")
    with enough_memory(f"use a smaller --batch than {batch}"):
        return measure(
            model.run,
            pairs,
            model.height,
            model.width,
            batch=batch,
            watch=lambda done: progress.update(task, completed=done),
            failed=None if failed is None else lambda pair, error: failed.append((pair.name, str(error))),
        )


def _measured_pairs(
    root: Path, split: Split, model: OpenedModel, val_fraction: float | None, split_seed: int | None
) -> tuple[list[Pair], float | None, int | None]:
    """The photos of a split, and the share of trainval and the seed that divide it into train and val.

    A line on stderr says so where val or test hold photos that the model was trained on, or may. See :func:`_divided`.
    """
    from petseg.evaluate import doubt_about

    parts, fraction, seed = _divided(root, split, model, val_fraction, split_seed)
    if doubt := doubt_about(model.provenance, root, parts, split, fraction, seed):
        click.echo(f"petseg: {doubt}", err=True)
    return list(parts[split]), fraction, seed


def _divided(
    root: Path, split: Split, model: OpenedModel, val_fraction: float | None, split_seed: int | None
) -> tuple[dict[Split, list[Pair]], float | None, int | None]:
    """The photos of a split, of train and val both, and the share of trainval and the seed that divide it into these.

    Both are as asked, or else as in the run that made the model; they are None where they divide nothing.

    Raises:
        UsageError: They were asked for, and val.txt divides.
    """
    from petseg.data import SPLIT_SEED, VAL_FRACTION, VAL_LISTING, Split, find, listed_validation
    from petseg.evaluate import listed_split, split_of

    if split not in (Split.TRAIN, Split.VAL):
        return {split: find(root, split)}, None, None
    fraction, seed = None, None
    if (val_fraction, split_seed) == (None, None) and (listed := listed_split(model.provenance, root)):
        return listed, None, None
    if listed_validation(root) is None:
        own = split_of(model.provenance) or (VAL_FRACTION, SPLIT_SEED)
        fraction = own[0] if val_fraction is None else val_fraction
        seed = own[1] if split_seed is None else split_seed
    elif (val_fraction, split_seed) != (None, None):
        raise UsageError(f"{root}: {VAL_LISTING} says which photos are val: leave out --val-fraction and --split-seed")
    parts: dict[Split, list[Pair]] = {}
    for part in (Split.TRAIN, Split.VAL):
        try:
            parts[part] = find(root, part, val_fraction=fraction or VAL_FRACTION, seed=seed or SPLIT_SEED)
        except DataError:
            if part is split:
                raise
            parts[part] = []  # a folder may have none: val.txt may list every photo
    return parts, fraction, seed


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


def _has_border(record: dict[str, Any]) -> bool:
    """Whether masks have one: ignoring it leaves as many pixels where there is none, as in masks of black and white."""
    ignored, background = (sum(record["readings"][name]["pixels"].values()) for name in ("ignored", "background"))
    return bool(ignored < background)


def _lower_cut(record: dict[str, Any], model: OpenedModel) -> float | None:
    """The model's threshold for cutouts, where it may be the fairer one: masks without a border may hold the fur.

    None where the masks have a border, or the model has no lower threshold.
    """
    cut = model.cutout_threshold
    return cut if cut is not None and cut < model.threshold and not _has_border(record) else None


def _print_metrics(record: dict[str, Any]) -> None:
    bordered, cutout = _has_border(record), record.get("cutout")
    table = Table(title=f"{record['photos']} photos, threshold {record['threshold']:.3f}")
    table.add_column("border counts as" if bordered else "", no_wrap=not bordered)
    names = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    rows = record["readings"] if bordered else {"no border": record}
    if cutout:
        rows = {f"{record['threshold']:.3f} (masks)": record, f"{cutout['threshold']:.3f} (cutouts)": cutout}
    for title, values in rows.items():
        table.add_row(title, *("-" if values[name] is None else f"{values[name]:.4f}" for name in names))
    Console().print(table)
    if not bordered:
        click.echo("the masks have no border: every reading of it gives these figures")
    if cutout:
        click.echo("if they hold the fur at the outline, the threshold for cutouts is the one to compare by")
    if record["photos_without_pet"]:
        without = ", ".join(map(shown, record["photos_without_pet"]))
        click.echo(f"masks without any pet, counted all the same: {without}")
