"""``petseg evaluate``: measure a model on labelled photos; prints a table, and writes files and a report page."""

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
from petseg_runtime.text import counted, shown

if TYPE_CHECKING:
    from petseg.data import Pair, Split
    from petseg.evaluate import Evaluation, OpenedModel

__all__ = ["evaluate"]


@click.command()
@click.argument("model", type=PATH)
@click.option("--data", "root", type=PATH, required=True, help="Labelled data folder.")
@click.option(
    "--split",
    type=click.Choice(["test", "val", "train", "trainval"]),
    default="test",
    show_default=True,
    help="Photos to measure on.",
)
@click.option(
    "--threshold",
    type=UNIT,
    help="Probability from which a pixel counts as pet, 0 to 1.  [default: the model's]",
)
@click.option(
    "--backend", type=BACKEND, default="auto", show_default=True, help=f"{HELP['backend']} For exported files."
)
@click.option(
    "--device", default="auto", show_default=True, help=f"{HELP['device']} For a checkpoint: cpu, cuda or cuda:N."
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Photos per forward pass.")
@click.option(
    "--without-doubtful",
    is_flag=True,
    help="Measure the masks that `petseg infer` shows: without low-confidence regions (no near-certain pixel).  "
    "[default: with them]",
)
@click.option(
    "--val-fraction",
    type=UNIT,
    help="For --split val or train: share of trainval that is val.  [default: as in the model's run, or 0.05]",
)
@click.option(
    "--split-seed",
    type=int,
    help="For --split val or train: seed that decides which photos are val.  [default: as in the model's run, or 0]",
)
@click.option("--output", type=PATH, help="Folder for evaluation.json, worst.png and per-photo images.csv.")
@click.option("--report", type=PATH, help="Folder for report.html, a page that explains the result, and report.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics to stdout as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
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

    Pixels are counted at each mask's original resolution and added up over the split. The headline figures count the
    trimap's border as background; the other two ways to count it are shown below them. A photo that cannot be read ends
    the measurement; with --report it is named and excluded, and the exit code is 3.

    With --split val or train, the photos are by default those that the model's own run validated or trained on. If the
    data folder lists its validation photos in val.txt, those are val, and --val-fraction is rejected.

    A checkpoint needs PyTorch, an exported file does not; --report and worst.png need matplotlib. The extra `train` has
    both.
    """
    from petseg.data import Split
    from petseg.evaluate import as_shown, open_model
    from petseg.memory import enough_memory
    from petseg_runtime.errors import EXIT_PARTIAL

    check_writable(output, report)  # before minutes of measuring
    if report:
        _check_drawable()
    failed: list[tuple[str, str]] | None = [] if report else None  # name of the photo, error message
    room = "free some memory on the device (another program may be using it), or use --device cpu"
    with enough_memory(room), open_model(model, device, backend) as opened, progress_line(quiet) as progress:
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
        click.echo(f"petseg: {shown(reason)}; excluded", err=True)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        _print_metrics(record)
        click.echo("".join(f"{line}\n" for line in written), nl=False)
    return EXIT_PARTIAL if failed else 0


def _measured(
    model: OpenedModel, pairs: Sequence[Pair], batch: int, progress: Progress, failed: list[tuple[str, str]] | None
) -> Evaluation:
    """Measure a model on photos, with a progress line.

    Args:
        model: The model.
        pairs: The photos.
        batch: Photos per forward pass.
        progress: The progress line.
        failed: Receives the name of each photo that cannot be read, and the error; None: the first one is raised.
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
    """Find the photos of a split; returns them, and the fraction and seed that divide trainval into train and val.

    Prints a line to stderr if val or test contain photos that the model was, or may have been, trained on. See
    :func:`_divided`.
    """
    from petseg.evaluate import split_warning

    parts, fraction, seed = _divided(root, split, model, val_fraction, split_seed)
    if doubt := split_warning(model.provenance, root, parts, split, fraction, seed):
        click.echo(f"petseg: {doubt}", err=True)
    return list(parts[split]), fraction, seed


def _divided(
    root: Path, split: Split, model: OpenedModel, val_fraction: float | None, split_seed: int | None
) -> tuple[dict[Split, list[Pair]], float | None, int | None]:
    """Find the photos of a split (of both train and val, for one of them), and what divides trainval into these.

    Fraction and seed are those asked for, or else those of the run that made the model; they are None if they are not
    used: for another split, or because a listing divides.

    Raises:
        UsageError: They were asked for, but val.txt divides, or the split is neither train nor val.
    """
    from petseg.data import SPLIT_SEED, VAL_FRACTION, VAL_LISTING, Split, find, listed_validation
    from petseg.evaluate import listed_split, split_of

    if split not in (Split.TRAIN, Split.VAL):
        if (val_fraction, split_seed) != (None, None):
            raise UsageError(
                f"--val-fraction and --split-seed have no effect on --split {split}; leave them out, or use --split "
                "val or train"
            )
        return {split: find(root, split)}, None, None
    fraction, seed = None, None
    if (val_fraction, split_seed) == (None, None) and (listed := listed_split(model.provenance, root)):
        return listed, None, None
    if listed_validation(root) is None:
        own = split_of(model.provenance) or (VAL_FRACTION, SPLIT_SEED)
        fraction = own[0] if val_fraction is None else val_fraction
        seed = own[1] if split_seed is None else split_seed
    elif (val_fraction, split_seed) != (None, None):
        raise UsageError(f"{root}: {VAL_LISTING} says which photos are val; leave out --val-fraction and --split-seed")
    parts: dict[Split, list[Pair]] = {}
    for part in (Split.TRAIN, Split.VAL):
        try:
            parts[part] = find(root, part, val_fraction=fraction or VAL_FRACTION, seed=seed or SPLIT_SEED)
        except DataError:
            if part is split:
                raise
            parts[part] = []  # this is possible: val.txt may list every photo
    return parts, fraction, seed


def _check_drawable() -> None:
    """Raises MissingExtra if matplotlib is not installed; tested before measuring because the charts come last."""
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
    """Write the files of --output; returns their names. Without matplotlib the picture is skipped, with a message.

    Raises:
        OutputError: The folder cannot be written to.
    """
    from petseg.evaluate import write_evaluation

    write_evaluation(result, record, folder)
    names, picture = ["evaluation.json", "images.csv"], "worst.png"
    try:
        from petseg import plots  # matplotlib takes a second to import
    except ModuleNotFoundError as error:
        said = f"not drawn, because it needs {error.name}: pip install {error.name}"
        click.echo(f"petseg: {shown(folder / picture)}: {said}", err=True)
        return names
    try:
        plots.worst(result, model, pairs, record["threshold"], folder / picture)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    return [*names, picture]


def _has_border(record: dict[str, Any]) -> bool:
    """Whether the masks have a border class. If not (black and white masks), ignoring it leaves as many pixels."""
    ignored, background = (sum(record["readings"][name]["pixels"].values()) for name in ("ignored", "background"))
    return bool(ignored < background)


def _lower_cut(record: dict[str, Any], model: OpenedModel) -> float | None:
    """Returns the model's threshold for cutouts, which may be the fairer one: masks without a border may include fur.

    None if the masks have a border, or that threshold is not lower.
    """
    return model.cutout_threshold if model.cutout_threshold < model.threshold and not _has_border(record) else None


def _print_metrics(record: dict[str, Any]) -> None:
    bordered, cutout = _has_border(record), record.get("cutout")
    table = Table(title=f"{counted(record['photos'], 'photo')}, threshold {record['threshold']:.3f}")
    table.add_column("border counts as" if bordered else "", no_wrap=not bordered)
    names = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
    for title in ("IoU", "Dice", "accuracy", "precision", "recall", "mean IoU per photo"):
        table.add_column(title, justify="right")
    rows = record["readings"] if bordered else {"no border": record}
    if cutout:
        rows = {f"{record['threshold']:.3f} (masks)": record, f"{cutout['threshold']:.3f} (cutouts)": cutout}
    for title, values in rows.items():
        table.add_row(title, *("-" if values[name] is None else f"{values[name]:.4f}" for name in names))
    Console().print(table)
    if not bordered:
        click.echo("the masks have no border class, so all three ways to count it give these figures")
    if cutout:
        click.echo("if the masks include the fur at the outline, compare by the threshold for cutouts")
    if record["photos_without_pet"]:
        without = ", ".join(map(shown, record["photos_without_pet"]))
        click.echo(f"masks without any pet, counted nevertheless: {without}")
