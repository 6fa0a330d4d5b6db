"""Writes tables, plots and figures of the pages from the records, and the map of modules; ``--check`` finds drift."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click

from benchmarks import machines, module_map, plots, prose, records, summary, tables


@dataclass(frozen=True)
class Section:
    """The text between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Attributes:
        make: Returns the text.
        of_the_model: Its records with figures of the built-in model. Those made with an earlier model are named below
            the text.
    """

    make: Callable[[], str]
    of_the_model: tuple[str, ...] = ()


#: The sections of each page.
PAGES: Final[Mapping[Path, Mapping[str, Section]]] = {
    records.ROOT / "README.md": {
        "cannot": Section(prose.cannot, ("found",)),
        "smooth": Section(prose.smooth, ("flicker",)),
        "quality": Section(summary.quality, ("accuracy", "shown")),
        "ahead": Section(summary.ahead, ("accuracy", "shown", "peers")),
        "fast": Section(summary.fast, ("peers", "latency", "video")),
        "training-time": Section(prose.training_time),
    },
    records.ROOT / "CONTRIBUTING.md": {"map": Section(module_map.module_map)},
    records.ROOT / "runtime" / "README.md": {
        "fast-decode": Section(prose.fast_decode, ("reduced-decoding",)),
        "no-pet": Section(prose.no_pet, ("found",)),
    },
    records.ROOT / "runtime" / "petseg_runtime" / "models" / "README.md": {
        "card": Section(prose.card, ("accuracy", "found")),
    },
    records.ROOT / "benchmarks" / "RESULTS.md": {
        "accuracy": Section(tables.accuracy, ("embedded-test-128", "embedded-test-native", "accuracy")),
        "published-cpu": Section(partial(tables.published_by_us, "training/published-cpu")),
        "width64": Section(partial(tables.published_by_us, "training/width64")),
        "shown": Section(tables.shown, ("shown",)),
        "engines": Section(tables.engines, ("accuracy",)),
        "others": Section(tables.others, ("accuracy",)),
        "receipts": Section(partial(tables.receipts, "receipts-edge"), ("receipts-edge",)),
        "receipts-wide": Section(partial(tables.receipts, "receipts-width64")),
        "latency": Section(tables.latency, ("latency",)),
        "folders": Section(tables.folders, ("throughput",)),
        "large": Section(tables.large, ("large",)),
        "peers": Section(tables.peers, ("peers",)),
        "machines": Section(machines.machines, ("latency", "peers", "video", "accuracy")),
        "video": Section(tables.video, ("video",)),
        "live": Section(tables.live, ("soak",)),
        "scaling": Section(tables.scaling, ("scaling",)),
        "training": Section(tables.training),
    },
}


def rendered(text: str, sections: Mapping[str, Section], page: str) -> str:
    """Returns a page with every section generated again.

    Raises:
        SystemExit: The page lacks a section.
    """
    for name, section in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no section {name!r}")
        body = section.make() + earlier(section.of_the_model)
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)  # type: ignore[misc]
    return text


def earlier(names: tuple[str, ...]) -> str:
    """Returns a note on the records that were made with an earlier built-in model, or an empty string."""
    now = records.shipped_model()
    found = [name for name in names if records.load(name).get("shipped_model") != now]
    return f"\n\nMeasured with an earlier built-in model: {', '.join(found)}." if found else ""


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if pages or plots do not match the records.")
def report(check: bool) -> None:
    """Write the tables and figures of the pages, the plots and the map of modules."""
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: rendered(old[page], sections, str(page.relative_to(records.ROOT))) for page, sections in PAGES.items()}
    if check:
        drifted = [str(page.relative_to(records.ROOT)) for page in PAGES if old[page] != new[page]] + plots.stale()
        sys.exit(f"{', '.join(drifted)}: out of date; run `python -m benchmarks report`" if drifted else 0)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    for path in plots.write():
        click.echo(path.relative_to(records.ROOT))
