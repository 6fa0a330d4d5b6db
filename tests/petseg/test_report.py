"""The report: its numbers are those of the evaluation, and its page is self-contained."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petseg import log, report, report_charts, report_page
from petseg.checkpoint import save_checkpoint
from petseg.cli import run
from petseg.data import Layout, Pair, Split, find
from petseg.evaluate import Evaluation, OpenedModel, evaluate, open_model
from petseg.log import Row
from petseg.metrics import Border, counts
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.report import Source
from petseg_runtime.errors import DataError, OutputError
from tiny_runs import a_row, red

H, W = 16, 48
READINGS = ("background", "pet", "ignored")
VOID = {"meta", "img", "br", "link", "input", "hr"}
#: A hostile name: a tag, an attribute that ends early and an invisible character, which must not reach the page.
HOSTILE = ["<script>alert(1)</script>", '" onerror="alert(1)', "a&b", "x\u202egpj.exe", "line\nfeed", "half\udc80", "'"]


class Page(HTMLParser):
    """Parses a page; a tag that is not closed, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> twice"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]


def write_pair(folder: Path, name: str, number: int, size: tuple[int, int] = (40, 56), pet: bool = True) -> Pair:
    """A photo that is approximately red where the pet is."""
    rng = np.random.default_rng(number)
    height, width = size
    y, x = np.mgrid[:height, :width]
    away = np.hypot((y - height / 2) / height, (x - width / 2) / width) * (1 + 0.2 * rng.random())
    trimap = (
        np.where(away < 0.25, 1, np.where(away < 0.32, 3, 2)).astype(np.uint8) if pet else np.full(size, 2, np.uint8)
    )
    photo = np.clip(255 * (1 - 2 * away)[..., None] + rng.normal(0, 12 * (number + 1), (*size, 3)), 0, 255)
    Image.fromarray(photo.astype(np.uint8)).save(folder / f"{number}.png")
    Image.fromarray(trimap).save(folder / f"{number}-mask.png")
    return Pair(name, folder / f"{number}.png", folder / f"{number}-mask.png", Layout.OXFORD)


@dataclasses.dataclass
class Written:
    """A written report, read back."""

    result: Evaluation
    record: dict[str, Any]
    values: dict[str, Any]
    html: str

    @property
    def page(self) -> Page:
        return Page(self.html)


MODEL = OpenedModel(red, H, W, 0.6, "m.safetensors", "ab" * 32, "red", 0.3, {"epoch": 2})
Maker = Callable[..., Written]


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Draws a chart once for the same values: the charts take nearly all of a report's time."""

    def remembered(draw: Callable[..., str]) -> Callable[..., str]:
        known: dict[str, str] = {}

        def drawn(*args: Any) -> str:
            key = json.dumps(args)
            if key not in known:
                known[key] = draw(*args)
            return known[key]

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in report_charts.__all__:
            patch.setattr(report_charts, name, remembered(getattr(report_charts, name)))
        yield


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Measures pairs and writes their report."""

    def made(
        pairs: list[Pair], threshold: float = 0.5, model: OpenedModel = MODEL, path: Path = Path("m.onnx"), **more: Any
    ) -> Written:
        result = evaluate(model.run, pairs, model.height, model.width)
        record = {**result.summary(threshold), "model": model.describe(), "split": "test"}
        source = Source(**{"root": Path("the data"), "split": Split.TEST, "pairs": pairs, **more})
        to = tmp_path / "new" / "report"
        report.write(result, record, model, source, path, to)
        assert {file.name for file in to.iterdir()} == {"report.html", "report.json"}
        text = (to / "report.html").read_text(encoding="utf-8")
        return Written(result, record, json.loads((to / "report.json").read_text()), text)

    return made


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Two breeds of cat, one of dog, different sizes; the last has no pet in its mask."""
    (tmp_path / "photos").mkdir()
    names = [
        *(f"Maine_Coon_{i}" for i in range(9)),
        *(f"Sphynx_{i}" for i in range(6)),
        *(f"pug_{i}" for i in range(7)),
    ]
    sizes = [(40, 56), (64, 20), (33, 33)]
    last = len(names) - 1
    return [write_pair(tmp_path / "photos", n, i, sizes[i % 3], i != last) for i, n in enumerate(names)]


# ------------------------------------------------------------------------------------------------ the numbers


def test_the_numbers_are_those_of_the_evaluation(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs, 0.45)
    assert made.values["schema_version"] == 1
    assert made.values["evaluation"] == made.record
    assert made.values["published"] == report.PUBLISHED
    assert made.values["model"]["thresholds"] == {"used": 0.45, "own": 0.6, "cutout": 0.3}
    assert made.values["data"]["photos"] == len(pairs)
    assert sum(made.values["data"]["pixels"].values()) == made.result.total.sum()
    text = made.page.text
    for reading in READINGS:
        values = made.record["readings"][reading]
        for name, form in (("iou", ".4f"), ("dice", ".4f"), ("mean_image_iou", ".4f")):
            assert format(values[name], form) in text
        for name in ("accuracy", "precision", "recall"):
            assert f"{100 * values[name]:.2f} %" in text
        for n in values["pixels"].values():
            assert f"{n:,}" in text
    for published in ("0.8375", "0.9116", "94.60 %", "89.61 %", "92.76 %"):
        assert published in text


@pytest.mark.parametrize("photos", [4, report_page.TEST_PHOTOS])
def test_a_part_of_the_test_photos_is_said_to_be_one(
    make: Maker, pairs: list[Pair], photos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(pairs[:4])
    assert report_page.TEST_PHOTOS == 3669
    monkeypatch.setitem(made.values["data"], "photos", photos)
    text = Page(report_page.page(made.values, {"best": (), "worst": ()})).text
    assert ("4 of 3669 test photos" in text) == ("of 3669" in text) == (photos == 4)
    assert text.count(" than published") == 5


@pytest.mark.parametrize(("split", "own"), [("test", True), ("val", False)])
def test_other_photos_are_not_compared_with_the_published_figures(
    make: Maker, pairs: list[Pair], folder_root: Path, split: str, own: bool
) -> None:
    made = make(find(folder_root, Split(split)) if own else pairs[:4], split=Split(split))
    assert made.values["published"] is None
    text = made.page.text
    for words in ("than published", "published attention U-Net", "0.8375", "of 3669"):
        assert words not in text
    assert "Published figures are not shown" in text


def test_masks_without_a_border_have_one_reading_on_the_page(make: Maker, pairs: list[Pair], folder_root: Path) -> None:
    for photos, rows, charts in ((find(folder_root, Split.TEST), 1, 1), (pairs, 3, 2)):
        made = make(photos)
        assert made.html.count('<th scope="row">this model</th>') == rows
        assert made.html.count('aria-label="Threshold sweep') == charts
        assert ("These masks have no border" in made.page.text) is (rows == 1)
        assert set(made.values["evaluation"]["readings"]) == set(READINGS), "the numbers keep their shape"


def test_each_photo_and_the_ends(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs)
    for border in Border:
        ious = made.result.image_ious(0.5, border)
        assert [row["iou"][border] for row in made.values["photos"]] == pytest.approx(ious.tolist())
    ious = dict(zip(made.result.names, made.result.image_ious(0.5), strict=True))
    best, worst = made.values["best"], made.values["worst"]
    assert (len(best), len(worst)) == (6, 12)
    assert not set(best) & set(worst)
    assert [ious[name] for name in worst] == sorted(ious.values())[:12]
    assert [ious[name] for name in best] == sorted((i for n, i in ious.items() if n != "pug_6"), reverse=True)[:6]
    assert made.values["photo_iou"]["mean"] == pytest.approx(made.record["mean_image_iou"])
    assert sum(made.values["photo_iou"]["photos"]) == len(pairs)
    cards = re.findall(r"<figcaption><code>([^<]+)</code>.*?<b>IoU ([0-9.]+)</b>", made.html)
    assert cards == [(name, f"{ious[name]:.3f}") for name in (*worst, *best)]
    assert len([s for s in made.page.all("src") if s.startswith("data:image/jpeg;base64,")]) == 3 * 18


def test_a_photo_without_a_pet_is_never_among_the_best() -> None:
    iou = np.array([1, 0.2, 0.9, 0.4, 0.8, 0.3])
    assert report.ends(iou, np.array([False, True, True, True, True, True])) == ([2, 4], [1, 5, 3, 0])
    assert report.ends(iou, np.full(6, fill_value=True)) == ([0, 2], [1, 5, 3, 4])


def test_the_sweep_is_counting_at_every_threshold(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs)
    found = made.values["sweep"]
    assert found["thresholds"] == pytest.approx([k / 255 for k in range(1, 255)])
    for border in Border:
        curves = found["readings"][border]
        for k in (0, 60, 127, 200, 253):
            for name, value in counts(made.result.total, found["thresholds"][k], border).ratios().items():
                assert curves[name][k] == (None if np.isnan(value) else pytest.approx(value))
        assert curves["best"]["iou"] == max(curves["iou"])


def test_the_reliability_is_that_of_the_pixels(pairs: list[Pair]) -> None:
    total = evaluate(red, pairs, H, W).total
    found = report.reliability(total)
    pet = np.repeat(np.tile(np.arange(256), 2), total[:2].ravel())
    truth = np.repeat([1, 0], total[:2].sum(axis=1))
    error = 0.0
    for number, row in enumerate(found["bins"]):
        mine = pet // 16 == number
        assert row["pixels"] == mine.sum()
        if mine.any():
            assert row["predicted"] == pytest.approx(pet[mine].mean() / 255)
            assert row["observed"] == pytest.approx(truth[mine].mean())
            assert row["from"] - 1 / 255 <= row["predicted"] <= row["to"] + 1 / 255
            error += mine.mean() * abs(pet[mine].mean() / 255 - truth[mine].mean())
        else:
            assert (row["predicted"], row["observed"]) == (None, None)
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert found["pixels"] == total[:2].sum(), "the border is ignored"


def test_a_perfectly_calibrated_model_has_no_calibration_error() -> None:
    total = np.zeros((3, 256), np.int64)
    level = np.arange(256)
    total[0], total[1], total[2] = level, 255 - level, 1000
    assert report.reliability(total)["expected_calibration_error"] == pytest.approx(0, abs=1e-12)
    assert report.reliability(0 * total)["expected_calibration_error"] is None


# ------------------------------------------------------------------------------------------------ breeds


def test_breeds_and_species_come_from_the_names(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs)
    assert made.values["breeds_left_out"] is None
    assert {(r["name"], r["species"], r["photos"]) for r in made.values["breeds"]} == {
        ("Maine Coon", "cat", 9),
        ("Sphynx", "cat", 6),
        ("pug", "dog", 7),
    }
    assert {(r["name"], r["photos"]) for r in made.values["species"]} == {("cat", 15), ("dog", 7)}
    assert [r["iou"] for r in made.values["breeds"]] == sorted((r["iou"] for r in made.values["breeds"]), reverse=True)
    pug = next(r for r in made.values["breeds"] if r["name"] == "pug")
    mine = [name.startswith("pug") for name in made.result.names]
    assert pug["iou"] == pytest.approx(counts(made.result.histograms[mine].sum(axis=0), 0.5).iou)
    assert pug["mean_image_iou"] == pytest.approx(made.result.image_ious(0.5)[mine].mean())
    text = made.page.text
    for row in (*made.values["breeds"], *made.values["species"]):
        assert f"{row['iou']:.3f} · {row['photos']} photos" in text


def test_the_data_sets_own_list_of_species_is_believed(make: Maker, oxford_root: Path) -> None:
    made = make(find(oxford_root, Split.TEST))  # pet_24 and so on, in lower case, which the list says are cats
    assert [(r["name"], r["species"]) for r in made.values["breeds"]] == [("pet", "cat")]


@pytest.mark.parametrize(("own", "oxfords"), [(True, False), (False, True)])
def test_the_licence_is_shown_for_oxfords_photos_only(
    make: Maker, pairs: list[Pair], folder_root: Path, own: bool, oxfords: bool
) -> None:
    text = make(find(folder_root, Split.TEST) if own else pairs[:4]).page.text
    assert ("CC BY-SA" in text) is oxfords
    assert ("belong to their data set" in text) is oxfords


@pytest.mark.parametrize(("cutout", "said"), [(0.3, True), (0.6, False)])
def test_two_thresholds_are_explained_where_there_are_two(
    make: Maker, pairs: list[Pair], cutout: float, said: bool
) -> None:
    text = make(pairs[:4], model=dataclasses.replace(MODEL, cutout_threshold=cutout)).page.text
    assert ("two thresholds: one for masks , which" in text) is said
    assert "Thresholds are chosen on validation photos" in text


def test_your_own_folder_has_no_breeds(make: Maker, folder_root: Path) -> None:
    made = make(find(folder_root, Split.TEST))
    assert made.values["breeds"] == made.values["species"] == []
    assert "names no breeds" in made.page.text
    assert not [label for label in made.page.all("aria-label") if "breed" in label]


@pytest.mark.parametrize(("name", "said"), [("IMG-1 (2)", "is named BREED_NUMBER"), ("IMG_0001", "a cat or a dog")])
def test_one_strange_name_and_there_are_no_breeds(make: Maker, pairs: list[Pair], name: str, said: str) -> None:
    made = make([*pairs[:3], dataclasses.replace(pairs[3], name=name)])
    assert made.values["breeds"] == made.values["species"] == []
    assert said in made.values["breeds_left_out"]
    assert f"(for example {name})" in made.page.text


def test_of_very_many_breeds_the_lowest_are_shown(
    make: Maker, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "BREEDS", 2)
    made = make(pairs)
    assert "The 2 lowest of 3 breeds" in made.page.text
    assert len(made.values["breeds"]) == 3
    chart = re.findall(r'aria-label="IoU of each breed".*?</svg>', made.html, re.DOTALL)[0]
    assert made.values["breeds"][0]["name"] not in chart
    assert made.values["breeds"][2]["name"] in chart


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_stands_alone(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", re.sub(r"base64,[^\"]+", "", made.html))
    assert not [tag for tag, _ in made.page.tags if tag in ("script", "link", "iframe", "object", "image")]
    for value in (*made.page.all("src"), *made.page.all("href"), *made.page.all("xlink:href")):
        assert value.startswith(("data:image/jpeg;base64,", "#"))
    assert re.findall(r"url\((?!#)", made.html) == []
    assert len(made.html) < 5 * 2**20


def test_every_link_leads_somewhere_and_every_id_is_its_own(make: Maker, pairs: list[Pair]) -> None:
    page = make(pairs).page
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    targets = [*page.all("href"), *page.all("xlink:href")]
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", " ".join(page.all("clip-path")))) <= set(ids)


def test_charts_take_their_colours_from_the_page(make: Maker, pairs: list[Pair]) -> None:
    made = make(pairs)
    for stand_in, name in report_charts.COLOURS.items():
        assert stand_in not in made.html
        assert made.html.count(f"--{name}:") == 3, "light, dark and paper"
    for chart in re.findall(r"<svg.*?</svg>", made.html, re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", chart)) == set(), "black on black"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_only_a_name(make: Maker, tmp_path: Path, name: str) -> None:
    (tmp_path / "photos").mkdir()
    hostile = write_pair(tmp_path / "photos", name, 0)
    empty = write_pair(tmp_path / "photos", f"empty {name}", 1, pet=False)
    model = dataclasses.replace(MODEL, file=name, provenance={name: [name, name]})
    made = make([hostile, empty], 0.999, model, root=Path(f"data {name}"), failed=[(name, f"{name}: broken")])
    page = made.page
    assert {tag for tag, _ in page.tags} & {"script", "iframe"} == set()
    assert page.all("onerror") == []
    for c in "\u202e\udc80":
        assert c not in made.html
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert page.all("alt")[:3] == [f"{seen}: {what}" for what in ("photo", "truth", "prediction")]
    assert f"{seen}: broken" in page.text
    assert made.values["worst"] == [name, f"empty {name}"]
    assert made.values["without_pet"] == [f"empty {name}"]


@pytest.mark.parametrize(("photos", "best", "worst"), [(1, 0, 1), (2, 0, 2), (3, 1, 2), (5, 1, 4), (17, 5, 12)])
def test_of_few_photos_none_is_shown_twice(make: Maker, pairs: list[Pair], photos: int, best: int, worst: int) -> None:
    made = make(pairs[:photos])
    assert (len(made.values["best"]), len(made.values["worst"])) == (best, worst)
    assert not set(made.values["best"]) & set(made.values["worst"])
    assert ('id="best"' in made.html) == (best > 0)
    assert made.page.text


@pytest.mark.parametrize("answer", [0, 255])
@pytest.mark.parametrize("pet", [True, False])
def test_a_model_that_always_says_the_same(make: Maker, tmp_path: Path, answer: int, pet: bool) -> None:
    """Undefined ratios, empty bins, equal values: the page says so and is still made."""
    (tmp_path / "photos").mkdir()
    same = dataclasses.replace(MODEL, run=lambda batch: np.full(batch.shape[:3], answer, np.uint8))
    made = make([write_pair(tmp_path / "photos", "pug_1", 0, pet=pet)], model=same)
    assert "nan" not in made.page.text.lower()
    assert made.values["without_pet"] == ([] if pet else ["pug_1"])
    assert made.values["missed"] == (["pug_1"] if pet and not answer else [])
    assert made.values["best"] == []
    if pet and not answer:
        assert made.record["precision"] is None
        assert "undefined: division by zero" in made.page.text


def test_tiny_photos_of_any_shape(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    sizes = [(1, 1), (1, 900), (900, 1), (3, 2)]
    assert make([write_pair(tmp_path / "photos", f"pug_{i}", i, size) for i, size in enumerate(sizes)]).page.text


def test_what_failed_what_has_no_pet_and_what_was_missed_is_named(make: Maker, pairs: list[Pair]) -> None:
    blind = dataclasses.replace(MODEL, run=lambda batch: np.zeros(batch.shape[:3], np.uint8))
    made = make(pairs[-3:], model=blind, failed=[("pug_99", "/data/pug_99.jpg: truncated")])
    assert made.values["failed"] == [{"name": "pug_99", "reason": "/data/pug_99.jpg: truncated"}]
    assert made.values["without_pet"] == ["pug_6"]
    assert made.values["missed"] == ["pug_4", "pug_5"]
    text = made.page.text
    for words in ("1 photo could not be read", "/data/pug_99.jpg: truncated", "mask; counted nevertheless: 1"):
        assert words in text


def test_a_long_list_of_names_is_cut_on_the_page_only(make: Maker, pairs: list[Pair]) -> None:
    failed = [(f"x{i}", f"x{i}: broken") for i in range(1000)]
    made = make(pairs[:2], failed=failed)
    assert "and 850 more, in report.json" in made.page.text
    assert len(made.values["failed"]) == 1000


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train", "trained on these photos, so these figures flatter"),
        ("trainval", "trained on most of these photos, so these figures flatter"),
        ("val", "best on validation photos, such as these, so these figures flatter"),
        ("test", None),
    ],
)
def test_a_split_that_the_model_was_made_with_is_reported_as_flattering(
    make: Maker, pairs: list[Pair], split: str, said: str | None
) -> None:
    made = make(pairs[:2], split=Split(split), val_fraction=0.2, split_seed=7)
    assert ("flatter" in made.page.text) == (said is not None)
    assert said is None or said in made.page.text
    assert ("0.2 of trainval, chosen by seed 7" in made.page.text) == (split in ("train", "val"))


def test_thresholds_are_marked(make: Maker, pairs: list[Pair]) -> None:
    charts = re.findall(r'aria-label="Threshold sweep.*?</svg>', make(pairs[:2], 0.45).html, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        for words in ("mask 0.60", "cutout 0.30", "used 0.45"):
            assert words in chart
    assert "used 0.60" not in make(pairs[:2], 0.6).html


def test_where_the_model_comes_from(make: Maker, pairs: list[Pair]) -> None:
    origin = {"config": {"optimizer": {"lr": 0.002}}, "val": float("nan"), "names": ["a", "b"], "long": "x" * 9999}
    made = make(pairs[:2], model=dataclasses.replace(MODEL, provenance=origin))
    text = made.page.text
    for words in ("ab" * 32, "config.optimizer.lr 0.002", "names a, b", "48 × 16", "0.6000", "0.3000"):
        assert words in text
    assert "x" * 301 not in text
    assert made.values["model"]["provenance"]["val"] is None


# ------------------------------------------------------------------------------------------------ training curves


def write_log(folder: Path, rows: list[Row]) -> Path:
    log.write(folder / log.LOG, rows)
    return folder / "best.safetensors"


@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_the_log_beside_a_checkpoint_is_drawn(make: Maker, pairs: list[Pair], tmp_path: Path, epochs: int) -> None:
    rows = [a_row(epoch=e, loss=1 / e, val_iou=0.5, val_dice=math.nan) for e in range(1, epochs + 1)]
    made = make(pairs[:2], path=write_log(tmp_path, rows))
    assert made.values["training"]["log"]["loss"] == [1 / e for e in range(1, epochs + 1)]
    assert made.values["training"]["log"]["val_dice"] == [None] * epochs
    assert made.values["training"]["checkpoint_epoch"] == 2
    assert "Training curves" in made.page.all("aria-label")
    assert "This checkpoint is from epoch 2" in made.page.text


@pytest.mark.parametrize("epoch", [float("nan"), float("inf"), 10**400, -1, "2", [2]], ids=lambda epoch: str(epoch)[:9])
def test_an_impossible_epoch_is_not_drawn(make: Maker, pairs: list[Pair], tmp_path: Path, epoch: object) -> None:
    path = write_log(tmp_path, [a_row()])
    made = make(pairs[:2], path=path, model=dataclasses.replace(MODEL, provenance={"epoch": epoch}))
    assert made.values["training"]["checkpoint_epoch"] is None


def test_of_an_exported_file_or_without_a_log_there_is_no_training(
    make: Maker, pairs: list[Pair], tmp_path: Path
) -> None:
    assert make(pairs[:2], path=tmp_path / "best.safetensors").values["training"] is None
    write_log(tmp_path, [a_row()])
    made = make(pairs[:2], path=tmp_path / "best.onnx")
    assert made.values["training"] is None
    assert 'id="training"' not in made.html


#: A log with the columns that all versions have had.
HEADER = ",".join(list(a_row().as_dict())[:10]) + "\n"


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", HEADER, HEADER + ",".join(["1", *["x"] * 9]), HEADER + ",".join(["nan"] * 10), "\0", "epoch\n1"],
)
def test_a_log_of_something_else_is_reported_and_not_drawn(
    make: Maker, pairs: list[Pair], tmp_path: Path, text: str
) -> None:
    (tmp_path / "log.csv").write_text(text)
    made = make(pairs[:2], path=tmp_path / "best.safetensors")
    assert "not a log of petseg train" in made.page.text


# ------------------------------------------------------------------------------------------------ writing


def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_own(
    make: Maker, pairs: list[Pair], tmp_path: Path
) -> None:
    (tmp_path / "new").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        make(pairs[:1])
    assert caught.value.exit_code == 6


def test_a_photo_that_has_disappeared_leaves_no_report(make: Maker, pairs: list[Pair], tmp_path: Path) -> None:
    def once(batch: np.ndarray) -> np.ndarray:
        pairs[0].image.unlink(missing_ok=True)
        return red(batch)

    with pytest.raises(DataError, match=r"0\.png"):
        make(pairs[:1], model=dataclasses.replace(MODEL, run=once))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network with a log beside it."""
    folder = tmp_path_factory.mktemp("run")
    path = write_log(folder, [a_row(epoch=e, loss=1 / e, val_iou=0.1 * e, val_dice=0.2 * e) for e in (1, 2, 3)])
    spec = {"height": 32, "width": 48, "threshold": 0.55, "cutout_threshold": 0.4, "border_target": 0.2}
    meta = {
        "kind": "model",
        "model": {"width": 2},
        "spec": spec,
        "epoch": 3,
        "provenance": {"command": "petseg train <x>"},
    }
    save_checkpoint(path, AttentionUNet(AttentionUNetConfig(width=2)).eval().state_dict(), meta)
    return path


def test_keys_of_the_photos_of_the_training_are_excluded(make: Maker, pairs: list[Pair]) -> None:
    origin = {"epoch": 2, "data": {"train_photos": 2, "train_keys": "abcdefghijkl"}}
    made = make(pairs[:2], model=dataclasses.replace(MODEL, provenance=origin))
    assert made.values["model"]["provenance"] == {"epoch": 2, "data": {"train_photos": 2}}
    assert "abcdefghijkl" not in made.html


@pytest.mark.parametrize("options", [[], ["--without-doubtful"]])
def test_a_page_says_that_low_confidence_regions_were_removed(
    checkpoint: Path, oxford_root: Path, tmp_path: Path, options: list[str]
) -> None:
    args = ["evaluate", str(checkpoint), "--data", str(oxford_root), "--device", "cpu", "-q", *options]
    assert run([*args, "--report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    said = "Without low-confidence regions (no near-certain pixel), as petseg infer shows it."
    assert (said in page.text) is bool(options)


def test_from_the_command_line(
    checkpoint: Path, oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", str(checkpoint), "--data", str(oxford_root), "--device", "cpu"]
    assert run([*args, "--report", str(tmp_path / "r")]) == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'r'}: report.html, report.json" in out
    assert not err
    values = json.loads((tmp_path / "r" / "report.json").read_text())
    with open_model(checkpoint, "cpu") as opened:
        record = evaluate(opened.run, find(oxford_root, Split.TEST), 32, 48).summary(0.55)
        assert values["evaluation"] == {**record, "model": opened.describe(), "split": "test", "doubtful": "kept"}
    assert values["model"]["thresholds"] == {"used": 0.55, "own": 0.55, "cutout": 0.4}
    assert values["model"]["provenance"]["parameters"] > 1000
    assert values["training"]["checkpoint_epoch"] == 3
    page = Page((tmp_path / "r" / "report.html").read_text(encoding="utf-8"))
    for words in ("best.safetensors", f"{record['iou']:.4f}", "petseg train <x>", "provenance.command"):
        assert words in page.text


def test_output_and_report_together_measure_once(
    checkpoint: Path, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    measure = evaluate

    def counted(*args: Any, **more: Any) -> Evaluation:
        calls.append(1)
        return measure(*args, **more)

    monkeypatch.setattr("petseg.evaluate.evaluate", counted)
    both = str(tmp_path / "both")
    args = ["evaluate", str(checkpoint), "--data", str(oxford_root), "--device", "cpu", "-q"]
    assert run([*args, "--output", both, "--report", both]) == 0
    assert calls == [1]
    files = {"evaluation.json", "images.csv", "worst.png", "report.html", "report.json"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == files
    evaluation = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert json.loads((tmp_path / "both" / "report.json").read_text())["evaluation"] == evaluation


@pytest.mark.parametrize("batch", ["1", "4"])
def test_a_broken_photo_is_named_and_excluded_of_a_report(
    checkpoint: Path, oxford_copy: Path, tmp_path: Path, batch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, *others = find(oxford_copy, Split.TEST)
    broken.image.write_bytes(b"no photo")
    args = ["evaluate", str(checkpoint), "--data", str(oxford_copy), "--device", "cpu", "--batch", batch]
    assert run(args) == 8, "without a report the measurement ends"
    capsys.readouterr()
    both = tmp_path / "both"
    assert run([*args, "--report", str(both), "--output", str(both), "--json"]) == 3
    out, err = capsys.readouterr()
    assert err.startswith(f"petseg: {broken.image}")
    assert json.loads(out)["photos_failed"] == [broken.name]
    assert json.loads(out)["photos"] == len(others)
    values = json.loads((both / "report.json").read_text())
    assert [row["name"] for row in values["photos"]] == [pair.name for pair in others]
    assert [row["name"] for row in values["failed"]] == [broken.name]
    with (both / "images.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [pair.name for pair in others]


def test_a_set_without_any_readable_photo_is_no_report(
    checkpoint: Path, oxford_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in find(oxford_copy, Split.TEST):
        pair.image.unlink()
    args = ["evaluate", str(checkpoint), "--data", str(oxford_copy), "--device", "cpu", "--report", str(tmp_path / "r")]
    assert run(args) == 8
    assert "none of the 6 photos can be read" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("option", ["--report", "--output"])
def test_a_bad_folder_is_found_before_the_measurement(
    checkpoint: Path,
    oxford_root: Path,
    tmp_path: Path,
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("petseg.evaluate.evaluate", lambda *args, **more: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(["evaluate", str(checkpoint), "--data", str(oxford_root), option, str(folder)]) == 6
        err = capsys.readouterr().err
        assert str(folder) in err
        assert "is not a folder" in err


def test_a_report_is_replaced_atomically(checkpoint: Path, oxford_copy: Path, tmp_path: Path) -> None:
    args = [
        "evaluate",
        str(checkpoint),
        "--data",
        str(oxford_copy),
        "--device",
        "cpu",
        "-q",
        "--report",
        str(tmp_path / "r"),
    ]
    assert run(args) == 0
    shutil.rmtree(oxford_copy / "images")
    (oxford_copy / "images").mkdir()
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    assert run(args) == 8
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
