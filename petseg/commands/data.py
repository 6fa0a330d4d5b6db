"""``petseg data``: download a data set, or check every file of one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from petseg.commands.console import progress_line
from petseg_runtime.cli.text import PATH
from petseg_runtime.text import counted, shown

__all__ = ["data"]


@click.group()
def data() -> None:
    """Download or check a data set."""


@data.command(short_help="Download the Oxford-IIIT Pet data set (0.8 GB).")
@click.argument("folder", type=PATH)
def download(folder: Path) -> int:
    """Download the Oxford-IIIT Pet data set (0.8 GB) into FOLDER and verify its checksums.

    Photos and masks are CC BY-SA 4.0; cite Parkhi et al., "Cats and Dogs", CVPR 2012.
    """
    from petseg.data import download as fetch

    fetch(folder)
    click.echo(f"{folder / 'oxford-iiit-pet'}: ready; `petseg data check {folder}` checks every file")
    return 0


@data.command()
@click.argument("folder", type=PATH)
@click.option(
    "--split", type=click.Choice(["all", "trainval", "test"]), default="all", show_default=True, help="Part to check."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings to stdout as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; only set the exit code.")
def check(folder: Path, split: str, as_json: bool, quiet: bool) -> int:
    """Open every photo and mask in FOLDER and report problems. Exit code 0: usable; 8: not.

    A data set is still usable with masks without a pet, masks that may be oriented differently from their photos, and
    unused files; these are reported, too.

    Photos are counted for each part that the data set itself lists: test, and trainval (train and val if there is a
    val.txt).
    """
    from petseg.data import Split, find_listed, find_unused, listed_validation
    from petseg.data import check as look
    from petseg_runtime.errors import DataError

    halves = [Split.TRAINVAL] if listed_validation(folder) is None else [Split.TRAIN, Split.VAL]
    parts = {"all": [*halves, Split.TEST], "trainval": halves, "test": [Split.TEST]}[split]
    listed = find_listed(folder, parts)
    pairs = [pair for part in listed.values() for pair in part]
    with progress_line(quiet) as progress:
        task = progress.add_task("checking", total=len(pairs), detail="")
        report = look(pairs, watch=lambda done: progress.update(task, completed=done))
    findings = {
        "missing": report.missing,
        "unreadable": report.unreadable,
        "wrong_size": report.wrong_size,
        "empty": report.empty,
        "orientation_unsure": report.orientation_unsure,
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
        found = ", ".join(f"{len(names)} {kind.replace('_', ' ')}" for kind, names in findings.items())
        click.echo(", ".join(f"{counted(number, 'pair')} in {name}" for name, number in splits.items()))
        click.echo(f"{counted(report.pairs, 'pair')}: {found}: {'usable' if report.usable else 'not usable'}")
    return 0 if report.usable else DataError.exit_code
