"""The HTML of a report: one file without scripts or external resources, for print, light and dark mode."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from petseg import report_charts as charts
from petseg.data import Layout
from petseg_runtime.text import shown

__all__ = ["TINTS", "Case", "page"]

#: RGB tints of the pictures; their legend uses the same.
TINTS: Final = {"border": (245, 190, 60), "false": (230, 60, 60), "missed": (50, 120, 240)}

RATIOS: Final = {
    "iou": "IoU",
    "dice": "Dice",
    "accuracy": "pixel accuracy",
    "precision": "precision",
    "recall": "recall",
}
#: Test photos of Oxford-IIIT Pet; the published figures are for all of them.
TEST_PHOTOS: Final = 3669
#: Why the figures on a split are better than they would be on new photos.
FLATTERS: Final = {
    "train": "The model may have been trained on these photos",
    "trainval": "The model may have been trained on most of these photos",
    "val": "The checkpoint and its threshold are those that were best on validation photos, such as these",
}
#: Rows or names that a page shows at most; report.json has all of them.
LIMIT: Final = 150
BREEDS: Final = 60

READINGS: Final = {
    "background": "background: the headline, as in the published figures",
    "pet": "pet: fur and outline count as the animal",
    "ignored": "ignored: only pixels that the annotators were sure of",
}


@dataclass(frozen=True)
class Case:
    """A photo that is shown with its result.

    Attributes:
        name: Its name.
        iou: Its IoU, with the border as background.
        empty: Whether its mask has no pet.
        photo: The photo, as JPEG.
        truth: JPEG: the photo, darkened outside the pet.
        prediction: JPEG: the photo, darkened outside the prediction, with mistakes tinted.
    """

    name: str
    iou: float
    empty: bool
    photo: bytes
    truth: bytes
    prediction: bytes


def page(values: Mapping[str, Any], cases: Mapping[str, Sequence[Case]]) -> str:
    """Render the page.

    Args:
        values: See :func:`petseg.report.numbers`.
        cases: The ``best`` and ``worst`` photos.
    """
    sections = [
        ("metrics", "Metrics", _metrics(values)),
        ("photos", "Photo by photo", _photos(values)),
        ("worst", "Worst photos", _cases(cases["worst"], worst=True)),
        ("best", "Best photos", _cases(cases["best"], worst=False)),
        ("breeds", "Cats, dogs and breeds", _breeds(values)),
        ("threshold", "Threshold", _sweep(values)),
        ("calibration", "Calibration", _reliability(values)),
        ("training", "Training", _training(values)),
        ("look", "Photos to look at", _names(values)),
        ("model", "Model and data", _facts(values)),
    ]
    filled = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in filled)
    body = "".join(f'<section id="{a}"><h2>{title}</h2>{text}</section>\n' for a, title, text in filled)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(_title(values))}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The policy makes the browser enforce that the page fetches nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><style>{CSS}</style></head>\n<body><main>\n'
        f"{_header(values)}<nav>{links}</nav>\n{body}{_footer(values)}</main></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------ the sections


def _title(values: Mapping[str, Any]) -> str:
    return f"{values['model']['file']} on {values['data']['folder']}, {values['data']['split']}"


def _header(values: Mapping[str, Any]) -> str:
    model, data, record = values["model"], values["data"], values["evaluation"]
    lines = [
        f"<b>{_count(data['photos'], 'photo')}</b> of the {_text(data['split'])} split of {_code(data['folder'])}, "
        f"{model['width']} × {model['height']} pixels network input, threshold "
        f"<b>{record['threshold']:.3f}</b>.",
    ]
    if data["split"] in FLATTERS:
        lines.append(f"<b>{FLATTERS[data['split']]}, so these figures flatter the model.</b>")
    if values["published"] and data["photos"] < TEST_PHOTOS:
        part = f"{data['photos']} of {TEST_PHOTOS} test photos"
        lines.append(f"These figures are for <b>{part}</b>, the published ones for all.")
    if record.get("doubtful") == "left out":
        lines.append("Without low-confidence regions (no near-certain pixel), as <code>petseg infer</code> shows it.")
    if data["failed"]:
        lines.append(
            f'<b>{_count(data["failed"], "photo")} could not be read</b> and <a href="#look">are excluded</a>.'
        )
    tiles = "".join(
        f'<div class="tile"><div class="what">{title}</div><div class="value">{_ratio(record[name], name)}</div>'
        f'<div class="than">{_delta(record[name], values["published"], name)}</div></div>'
        for name, title in RATIOS.items()
    )
    return (
        f'<header><p class="kind">petseg evaluation</p><h1>{_text(model["file"])}</h1>'
        f'<p class="lead">{"<br>".join(lines)}</p></header>\n<div class="tiles">{tiles}</div>\n'
    )


def _metrics(values: Mapping[str, Any]) -> str:
    record, published = values["evaluation"], values["published"]
    head = "".join(f"<th>{title}</th>" for title in (*RATIOS.values(), "mean IoU per photo"))
    readings = _readings(values)
    rows = [_row("this model", READINGS[b], record["readings"][b], b) for b in readings]
    note = "Published figures are not shown, because they are for the test photos of Oxford-IIIT Pet."
    if published:
        theirs = {**published, "mean_image_iou": None}
        rows.insert(0, _row("published attention U-Net", "background", theirs, "published"))
        note = (
            f"The published figures are those of a network with 29.3 M parameters on all {TEST_PHOTOS} test photos of "
            "Oxford-IIIT Pet, at an input size that its source does not give. Compare only figures that were measured "
            "on such photos with them."
        )
    counted = "".join(
        f'<tr><th scope="row">{b}</th>'
        + "".join(f"<td>{n:,}</td>" for n in record["readings"][b]["pixels"].values())
        + "</tr>"
        for b in readings
    )
    border = (
        "The hand-drawn masks have a third class, the <b>border</b> (fur, outline). How it is counted changes every "
        "figure, so all three ways are shown."
        if len(readings) > 1
        else "These masks have no border, so there is only one way to count."
    )
    return (
        "<p>Each pixel is compared with a hand-drawn mask; pixels are added up over all photos. <b>IoU</b> is the "
        "share of pixels that are pet in both masks among those that are pet in either: 1 is perfect, 0 is a miss. "
        "<b>Precision</b> is the share of pixels found that are pet, <b>recall</b> the share of pet pixels that were "
        f"found; <b>Dice</b> is their harmonic mean. {border}</p>"
        f'<div class="wide"><table><thead><tr><th></th><th class="words">border counts as</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{note}</p>'
        '<div class="wide"><table><thead><tr><th>pixels, border counts as</th><th>pet, found</th>'
        f"<th>not pet, found</th><th>pet, missed</th><th>not pet, not found</th></tr></thead>"
        f"<tbody>{counted}</tbody></table></div>"
    )


def _readings(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the ways to count the border that differ; black-and-white masks have no border."""
    return tuple(READINGS) if values["data"]["pixels"]["border"] else ("background",)


def _row(name: str, reading: str, values: Mapping[str, Any], key: str) -> str:
    cells = "".join(f"<td>{_ratio(values[ratio], ratio)}</td>" for ratio in (*RATIOS, "mean_image_iou"))
    return f'<tr class="{key}"><th scope="row">{name}</th><td class="words">{reading}</td>{cells}</tr>'


def _photos(values: Mapping[str, Any]) -> str:
    spread = values["photo_iou"]
    return (
        f"<p>Half of the photos have an IoU of <b>{spread['median']:.3f}</b> or more; one in twenty has "
        f"<b>{spread['p5']:.3f}</b> or less. The mean is {spread['mean']:.3f}. (Border as background. Each photo "
        "counts the same here, whatever its size.)</p>"
        f"<figure>{charts.photo_histogram(spread, 'Histogram of the IoU of the photos')}</figure>"
    )


def _cases(cases: Sequence[Case], worst: bool) -> str:
    if not cases:
        return ""
    legend = "".join(
        f'<span><i style="background:rgb{TINTS[name]}"></i>{words}</span>'
        for name, words in (("missed", "pet, missed"), ("false", "not pet, found"), ("border", "border"))
    )
    lead = (
        "Photo, ground truth, prediction. Pixels that are pet, or predicted as pet, are bright. Look for what these "
        "photos have in common, and for wrong masks."
        if worst
        else "The same for those with the highest IoU."
    )
    cards = "".join(map(_card, cases))
    return f'<p>{lead}</p><p class="legend">{legend}</p><div class="cases">{cards}</div>'


def _card(case: Case) -> str:
    pictures = "".join(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{_text(f"{case.name}: {what}")}">'
        for what, data in (("photo", case.photo), ("truth", case.truth), ("prediction", case.prediction))
    )
    note = " <em>no pet in its mask</em>" if case.empty else ""
    return (
        f'<figure class="case"><div class="strip">{pictures}</div>'
        f"<figcaption>{_code(case.name)}{note}<b>IoU {case.iou:.3f}</b></figcaption></figure>"
    )


def _breeds(values: Mapping[str, Any]) -> str:
    if values["breeds_left_out"]:
        return f"<p>Not available. {_text(values['breeds_left_out'])}</p>"
    colours = {"cat": charts.ORANGE, "dog": charts.BLUE}
    species = [(f"{r['name']}s", r["iou"], r["photos"], colours[r["name"]]) for r in values["species"]]
    breeds = [(r["name"], r["iou"], r["photos"], colours[r["species"]]) for r in values["breeds"]]
    cut = f" The {BREEDS} lowest of {len(breeds)} breeds; report.json has the others." if len(breeds) > BREEDS else ""
    legend = '<span><i class="orange"></i>cats</span><span><i class="blue"></i>dogs</span>'
    return (
        "<p>IoU over all pixels of each group, with the border as background, and the number of photos; with few "
        f'photos the figure is unreliable.{cut}</p><p class="legend">{legend}</p>'
        f"<figure>{charts.bars(species, 'IoU of cats and dogs')}</figure>"
        f"<figure>{charts.bars(breeds[-BREEDS:], 'IoU of each breed')}</figure>"
    )


def _sweep(values: Mapping[str, Any]) -> str:
    found, thresholds = values["sweep"], values["model"]["thresholds"]
    marks = {"mask": thresholds["own"], "cutout": thresholds["cutout"]}
    if abs(thresholds["used"] - thresholds["own"]) > 1e-9:
        marks["used"] = thresholds["used"]
    titles = {"background": "Border as background", "ignored": "Border ignored"}
    charted = "".join(
        f"<figure><figcaption>{title}</figcaption>"
        + charts.sweep(found["thresholds"], found["readings"][reading], marks, f"Threshold sweep, border {reading}")
        + f'<p class="note">Highest IoU here: {_ratio(found["readings"][reading]["best"]["iou"], "iou")} at '
        f"{found['readings'][reading]['best']['threshold']:.3f}.</p></figure>"
        for reading, title in titles.items()
        if reading in _readings(values)
    )
    return (
        f"<p>A lower threshold finds more of the pet and more background. {_thresholds(thresholds)}Thresholds are "
        "chosen on validation photos; the best one on a test set is a finding, not a setting.</p>"
        f'<div class="two">{charted}</div>'
    )


def _thresholds(thresholds: Mapping[str, Any]) -> str:
    """Explains the model's two thresholds, if it has two."""
    if thresholds["cutout"] >= thresholds["own"]:
        return ""
    return (
        "The model has two thresholds: one for <b>masks</b>, which excludes the outline like the published metric, and "
        "a lower one for <b>cutouts</b>, where fur belongs to the pet. "
    )


def _reliability(values: Mapping[str, Any]) -> str:
    found = values["reliability"]
    error = found["expected_calibration_error"]
    if error is None:
        return ""
    chart = charts.reliability(found["bins"], "Reliability curve")
    return (
        '<div class="two"><figure>' + chart + "</figure><div><p>Of the pixels with a predicted probability of "
        "70 %, are 70 % pet? On the dashed line they are. Above it the model is underconfident, below it "
        "overconfident. The strip shows how many pixels each point represents: most are near 0 or 1, and points with "
        "few pixels have little weight.</p>"
        f"<p>Expected calibration error: <b>{error:.4f}</b>, the mean distance from the line, weighted by pixels "
        f"({len(found['bins'])} bins, {found['pixels']:,} pixels, border ignored).</p></div></div>"
    )


def _training(values: Mapping[str, Any]) -> str:
    found = values["training"]
    if found is None:
        return ""
    if "problem" in found:
        return f"<p>Not available: {_text(found['problem'])}.</p>"
    log, kept = found["log"], found["checkpoint_epoch"]
    chart = charts.training(log, kept, "Training curves")
    said = "" if kept is None else f" This checkpoint is from epoch {kept:g}, the dotted line."
    epochs = _count(len(log["epoch"]), "epoch")
    return f"<p>{epochs}, from log.csv beside the checkpoint.{said}</p><figure>{chart}</figure>"


def _names(values: Mapping[str, Any]) -> str:
    failed = [f"{_text(row['reason'])}" for row in values["failed"]]
    kinds = (
        ("Could not be read; excluded from all figures", failed),
        ("No pet in the hand-drawn mask; counted nevertheless", [_code(name) for name in values["without_pet"]]),
        (
            "No pixel that was found is pet in the hand-drawn mask (IoU 0): a miss, or a wrong mask",
            [_code(name) for name in values["missed"]],
        ),
    )
    found = "".join(f"<h3>{title}: {len(rows)}</h3><ul>{_items(rows)}</ul>" for title, rows in kinds if rows)
    return found or "<p>None: every photo could be read, has a pet in its mask, and some of it was found.</p>"


def _items(rows: Sequence[str]) -> str:
    more = f"<li>and {len(rows) - LIMIT} more, in report.json</li>" if len(rows) > LIMIT else ""
    return "".join(f"<li>{row}</li>" for row in rows[:LIMIT]) + more


def _facts(values: Mapping[str, Any]) -> str:
    model, data = values["model"], values["data"]
    thresholds = model["thresholds"]
    pixels = sum(data["pixels"].values())
    facts = {
        "file": model["file"],
        "identity": model["identity"],
        "engine": model["engine"],
        "input": f"{model['width']} × {model['height']} (width × height)",
        "threshold used": f"{thresholds['used']:.4f}",
        "threshold of the model": f"{thresholds['own']:.4f}",
        "threshold for cutouts": f"{thresholds['cutout']:.4f}",
        "data": f"{data['folder']} ({data['layout']} layout), split {data['split']}",
        "photos": f"{data['photos']} measured, {data['failed']} not readable",
        "photos without a pet": len(values["without_pet"]),
        "pixels": ", ".join(f"{n / max(pixels, 1):.1%} {name}" for name, n in data["pixels"].items())
        + f" of {pixels:,}",
    }
    if "val_fraction" in data:
        facts["validation"] = f"{data['val_fraction']:g} of trainval, chosen by seed {data['split_seed']}"
    if "val_listing" in data:
        facts["validation"] = f"the photos listed in {data['val_listing']}"
    origin = list(_flat(model["provenance"]))
    more = {"…": f"{len(origin) - LIMIT} more, in report.json"} if len(origin) > LIMIT else {}
    return (
        f"{_list(facts)}<h3>Origin of the model</h3>{_list({**dict(origin[:LIMIT]), **more}, 'small')}"
        if origin
        else _list(facts)
    )


def _footer(values: Mapping[str, Any]) -> str:
    theirs = (
        " Photos and masks belong to their data set (Oxford-IIIT Pet: Parkhi et al., Cats and Dogs, CVPR 2012, "
        "CC BY-SA 4.0)."
    )
    return (
        f"<footer>petseg {_text(values['petseg'])}, {_text(values['created'])}. All numbers of this page and of each "
        f"photo are in report.json beside it.{theirs if values['data']['layout'] == Layout.OXFORD else ''}</footer>\n"
    )


# ------------------------------------------------------------------------------------------------ words


def _text(value: object) -> str:
    """Escape text for HTML; invisible characters (control and direction characters, surrogates) become ``\\x1b``."""
    return html.escape(shown(value))


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ratio(value: float | None, name: str) -> str:
    """Format with four digits; pixel accuracy, precision and recall in percent, as in the published figures."""
    if value is None:
        return "–"
    return f"{value:.2%}".replace("%", " %") if name in ("accuracy", "precision", "recall") else f"{value:.4f}"


def _delta(value: float | None, published: Mapping[str, float] | None, name: str) -> str:
    if value is None:
        return "undefined: division by zero"
    if published is None:
        return ""
    points = 100 * (value - published[name])
    return f"{abs(points):.2f} points {'higher' if points >= 0 else 'lower'} than published"


def _list(facts: Mapping[str, object], kind: str = "") -> str:
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(_short(value))}</dd></div>" for name, value in facts.items())
    return f'<dl class="{kind}">{rows}</dl>'


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    """Flatten nested objects to ``outer.inner``, and join lists to text."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{before}{name}.")
        elif inner is not None:
            yield f"{before}{name}", ", ".join(map(str, inner)) if isinstance(inner, list) else inner


CSS: Final = """
:root{--page:#fff;--card:#f6f7f9;--ink:#1b1f24;--muted:#5b6570;--line:#dfe3e8;--blue:#2563c9;--orange:#c8660a;
--green:#1a7f4b;--purple:#8a3fb5}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1e2329;--ink:#e8ebee;--muted:#9aa5b1;--line:#343b44;
--blue:#6aa5ff;--orange:#f5a04a;--green:#57c98a;--purple:#c792ea}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--muted:#444;--line:#ccc;--blue:#2563c9;--orange:#c8660a;
--green:#1a7f4b;--purple:#8a3fb5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:21px;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 6px}
p{max-width:78ch;margin:8px 0}
a{color:var(--blue)}
.kind{color:var(--muted);text-transform:uppercase;letter-spacing:.08em;font-size:12px;margin:0}
.lead{font-size:16px}.note,.than,footer{color:var(--muted);font-size:13px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:20px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.what{color:var(--muted);font-size:13px}.value{font-size:27px;font-weight:650;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
thead th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom}
td{white-space:nowrap}th:first-child,.words{text-align:left}
tbody th{font-weight:500}td.words{white-space:normal;min-width:17ch;color:var(--muted);font-size:13px}
tr.background td:not(.words),tr.background th{font-weight:650}
figure{margin:14px 0}figcaption{font-size:14px}
svg{display:block;width:100%;height:auto;max-width:900px}
svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:8px 28px;align-items:center}
.two figcaption{font-weight:650}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:16px}
.case{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px}
.strip{display:grid;grid-template-columns:repeat(3,1fr);gap:4px}
.strip img{width:100%;height:170px;object-fit:contain;display:block}
.case figcaption{display:flex;justify-content:space-between;gap:10px;padding:7px 4px 0;font-size:13px}
code{font:12.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.case code{min-width:0}.case b{white-space:nowrap}.case em{color:var(--muted)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--muted)}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
i.orange{background:var(--orange)}i.blue{background:var(--blue)}
ul{padding-left:20px;margin:6px 0;columns:auto 260px;column-gap:28px}li{overflow-wrap:anywhere}
dl{margin:10px 0;font-size:14px}
dl div{display:grid;grid-template-columns:minmax(0,190px) minmax(0,1fr);gap:12px;padding:4px 0;
border-bottom:1px solid var(--line);break-inside:avoid}
dt{color:var(--muted);overflow-wrap:anywhere}dd{margin:0;overflow-wrap:anywhere}
dl.small{columns:2 400px;column-gap:32px;font-size:13px}dl.small div{grid-template-columns:2fr 3fr}
footer{margin-top:44px;border-top:1px solid var(--line);padding-top:12px}
@media (max-width:600px){figure:not(.case){overflow-x:auto}svg{min-width:540px}.strip img{height:120px}}
@media print{nav{display:none}figure,tr,.tile{break-inside:avoid}h2,h3,.legend{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body,.lead,table,dl,dl.small{font-size:10px}.note,.than,footer,figcaption,td.words,thead th{font-size:9px}
main{max-width:none;padding:0}h1{font-size:22px}h2{font-size:15px;margin-top:22px}.value{font-size:17px}
th,td{padding:3px 6px}.tiles{grid-template-columns:repeat(5,1fr);gap:6px}.tile{padding:6px 8px}
.cases,.two{grid-template-columns:1fr 1fr;gap:8px}.strip img{height:78px}svg{min-width:0}
dl.small{columns:2}dl.small div{padding:1px 0}}
"""
