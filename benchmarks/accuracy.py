"""Accuracy of the built-in model in every CPU engine and precision, on all test sets, compared with other networks.

    python -m benchmarks accuracy --data data --isnet isnet.onnx

The metrics are those of ``petseg evaluate``, with all three readings of the border, at three thresholds chosen on
validation photos, one for each reading: the model's default (border as background), its lower one for cutouts (border
as pet), and one for an ignored border. The checkpoint runs in PyTorch on all photos. The engines run on a seeded subset
of a large set, and are compared with the checkpoint on the same photos: the engines differ by a hundredth of what other
photos would change. The int8 file is not built in: it is exported here unless ``--int8`` names one. ISNet
(benchmarks/peers/isnet.py) takes seconds a photo, so it runs on a seeded subset of each set, and so does the built-in
model for that comparison. ISNet was not trained on these labels. Besides 0.5, it therefore gets, for each reading, the
threshold that is best on the very photos it is measured on: no fair choice of a threshold could do better. LR-ASPP
(rival.py), whose accuracy has a record of its own, is timed beside the model.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import torch

from benchmarks import photos as folders
from benchmarks import records
from benchmarks.latency import CHECKPOINT, described
from benchmarks.peers.isnet import SIZE, ISNet
from benchmarks.published import CHOSEN
from benchmarks.rival import timed_beside
from benchmarks.thresholds import best_of_each, thresholds_of
from petseg.data import Pair, Split, find
from petseg.evaluate import U8, Evaluation, Run, evaluate, open_model
from petseg.metrics import Border, counts
from petseg_export import OnnxConfig, QuantizeConfig, export
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.spec import ModelSpec

#: Photos of the int8 export's parity test.
PARITY_PHOTOS: Final = 200
METRICS: Final = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
RESAMPLES: Final = 1000
#: Photos of each set that the engines run on.
ENGINE_PHOTOS: Final = 400
#: File, engine, and whether it must compute in the stored precision, which ONNX Runtime on a CPU does in any case.
COMPUTED: Final = (
    ("fp32", "onnxruntime", True),
    ("fp32", "openvino", True),
    ("fp32", "openvino", False),
    ("int8", "onnxruntime", True),
    ("int8", "openvino", False),
)


@click.command()
@folders.data_option
@click.option(
    "--int8", type=click.Path(path_type=Path, exists=True), help="The model in int8.  [default: exported here]"
)
@click.option(
    "--isnet",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="ISNet's ONNX file; see benchmarks/peers/isnet.py.  [default: ISNet is not measured]",
)
@click.option(
    "--isnet-photos", type=click.IntRange(2), default=20, show_default=True, help="Photos of each set for ISNet."
)
@click.option(
    "--engine-photos",
    type=click.IntRange(2),
    default=ENGINE_PHOTOS,
    show_default=True,
    help="Photos of each set for the engines.",
)
@click.option("--photos", type=click.IntRange(2), help="Photos of each set, for a trial run.  [default: all]")
def accuracy(
    data: Path, int8: Path | None, isnet: Path | None, isnet_photos: int, engine_photos: int, photos: int | None
) -> None:
    """Measure the IoU in every engine and precision, and that of a background remover."""
    remover = ISNet(isnet) if isnet else None  # first, so that a wrong file fails at once and not after minutes
    sets = {what: sample(find(root, Split.TEST), photos) for what, root in folders.test_sets(data).items()}
    thresholds = thresholds_of(data)
    some = {what: sample(pairs, engine_photos) for what, pairs in sets.items()}
    whole: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    click.echo("IoU at the default threshold, of each set: border as background, as pet, ignored", err=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"fp32": default_model(), "int8": int8 or exported(data, Path(scratch) / "int8.onnx")}
        for about, run, model in variants(files):
            results = {
                what: evaluate(run, pairs, model.height, model.width)
                for what, pairs in (some if whole else sets).items()
            }
            if not whole:  # the checkpoint comes first
                whole.append({**about, "sets": all_thresholds(results, thresholds)})
                results = {what: part(result, some[what]) for what, result in results.items()}
            compared.append({**about, "sets": all_thresholds(results, thresholds)})
            click.echo(line(compared[-1]), err=True)
    artifact = open_artifact(default_model())
    chosen = {what: sample(pairs, isnet_photos) for what, pairs in sets.items()}
    values = {
        "model": {"name": artifact.spec.name, "identity": artifact.identity, "checkpoint": CHECKPOINT.name},
        "thresholds": thresholds,
        "photos": {what: len(pairs) for what, pairs in sets.items()},
        "rows": with_losses(whole),
        "compared": {"photos": {what: len(pairs) for what, pairs in some.items()}, "rows": with_losses(compared)},
        "isnet": remover and {what: beside(remover, pairs, thresholds) for what, pairs in chosen.items()},
        "rival_times": timed_beside(),
    }
    given = {"--int8 FILE": int8, f"--photos {photos}": photos, f"--isnet FILE --isnet-photos {isnet_photos}": isnet}
    given |= {f"--engine-photos {engine_photos}": engine_photos != ENGINE_PHOTOS}
    options = " ".join(["--data DATA", *(option for option, value in given.items() if value)])
    click.echo(records.write("accuracy", f"python -m benchmarks accuracy {options}", values))


def sample(pairs: Sequence[Pair], photos: int | None) -> list[Pair]:
    """Return all pairs, or a seeded sample of ``photos`` of them in their original order."""
    if photos is None or photos >= len(pairs):
        return list(pairs)
    return [pairs[index] for index in sorted(random.Random(0).sample(range(len(pairs)), photos))]


def exported(data: Path, output: Path) -> Path:
    """Export the checkpoint in int8, calibrated on training and judged on validation photos, as for the receipts."""
    quantize = QuantizeConfig(data=folders.training_set(data))
    parity: dict[str, Any] = {"data": folders.original_size(data), "split": "test", "photos": PARITY_PHOTOS}
    return export(CHECKPOINT, OnnxConfig(output=output, precision="int8", quantize=quantize, **parity)).path


def variants(files: dict[str, Path]) -> Iterator[tuple[dict[str, str], Run, ModelSpec]]:
    """Yield the model in each engine and precision, open until the next one; the checkpoint in PyTorch comes first."""
    spec = open_artifact(files["fp32"]).spec
    with open_model(CHECKPOINT, "cpu") as model:
        version = torch.__version__.partition("+")[0]
        about = {"engine": f"PyTorch {version}, eager", "stored": "checkpoint", "precision": "f32"}
        yield {"name": "PyTorch fp32", **about}, model.run, spec
    seen = set()
    for stored, engine, exact in COMPUTED:
        with load_engine(open_artifact(files[stored]), engine, device="cpu", exact=exact) as opened:
            about = described(opened)
            name = f"{engine} {stored}, {about['precision']}"
            if name not in seen:  # a CPU without bf16 computes in float32 either way
                yield {"name": name, **about}, opened.run, spec
            seen.add(name)


def part(result: Evaluation, pairs: Sequence[Pair]) -> Evaluation:
    """Return the evaluation restricted to some of its photos."""
    names = {pair.name for pair in pairs}
    chosen = [index for index, name in enumerate(result.names) if name in names]
    return Evaluation(tuple(result.names[index] for index in chosen), result.histograms[chosen])


def all_thresholds(results: Mapping[str, Evaluation], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Return the metrics of each set at each threshold."""
    return {
        what: {name: metrics(result, threshold) for name, threshold in thresholds.items()}
        for what, result in results.items()
    }


def metrics(result: Evaluation, threshold: float) -> dict[str, Any]:
    """Return all metrics in the three readings, and the confidence interval of the IoU."""
    readings = result.summary(threshold)["readings"]
    return {
        "threshold": threshold,
        "readings": {
            border: {
                **{name: readings[border][name] for name in METRICS},
                "iou_interval_95": interval(result, threshold, Border(border)),
            }
            for border in readings
        },
    }


def interval(result: Evaluation, threshold: float, border: Border) -> list[float]:
    """Return the 95 % interval of the IoU summed over the photos, by resampling the photos (bootstrap, Efron 1979)."""
    return percentiles(resampled(result, threshold, border))


def difference(ours: tuple[Evaluation, float], theirs: tuple[Evaluation, float], border: Border) -> list[float]:
    """Return the 95 % interval of the difference in IoU, each at its threshold, over the same resamples for both."""
    return percentiles(resampled(*ours, border) - resampled(*theirs, border))


def resampled(result: Evaluation, threshold: float, border: Border) -> npt.NDArray[np.float64]:
    """Return the IoU of each of ``RESAMPLES`` resamples of the photos."""
    each = [counts(one, threshold, border) for one in result.histograms]
    pixels = np.array([(one.tp, one.tp + one.fp + one.fn) for one in each], np.float64)
    # How often each photo is drawn, for each resample: a matrix product in place of a loop.
    drawn = np.random.default_rng(0).multinomial(len(each), np.full(len(each), 1 / len(each)), RESAMPLES)
    both, either = (drawn @ pixels).T
    found: npt.NDArray[np.float64] = both / np.maximum(either, 1)
    return found


def percentiles(values: npt.NDArray[np.float64]) -> list[float]:
    """Return the bounds of the middle 95 %."""
    return [round(float(value), 4) for value in np.percentile(values, (2.5, 97.5))]


def with_losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row how many points of IoU it loses against the first row, the checkpoint in PyTorch."""
    for row in rows:
        for what, thresholds in row["sets"].items():
            for kind, found in thresholds.items():
                for border, values in found["readings"].items():
                    reference = rows[0]["sets"][what][kind]["readings"][border]["iou"]
                    values["points_lost"] = round(100 * (reference - values["iou"]), 3) + 0.0  # turns -0.0 into 0.0
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the console output."""
    ious = (f"{values['iou']:.4f}" for found in row["sets"].values() for values in found["own"]["readings"].values())
    return f"{row['name']:>32} {' '.join(ious)}"


def beside(remover: ISNet, pairs: Sequence[Pair], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Compare ISNet with the built-in model, in the engine that ``auto`` chooses, on the same photos."""
    remover(np.zeros((1, SIZE, SIZE, 3), np.uint8))  # warm-up, as petseg's below: the first run is not timed
    theirs = Timed(remover)
    result = evaluate(theirs, pairs, SIZE, SIZE, batch=1)
    best = best_of_each(result)
    artifact = open_artifact(default_model())
    with load_engine(artifact, device="cpu") as engine:
        engine.warm_up()
        ours = Timed(engine.run)
        own = evaluate(ours, pairs, artifact.spec.height, artifact.spec.width, batch=1)
        about = described(engine)
    mine = {border: thresholds[kind] for border, kind in CHOSEN.items()}
    return {
        "photos": list(result.names),
        "isnet": {
            "input": [SIZE, SIZE],
            **theirs.as_record(),
            "at_0.5": metrics(result, 0.5),
            **{f"at_best_for_{border}": metrics(result, threshold) for border, threshold in best.items()},
        },
        "petseg": {
            "input": [artifact.spec.height, artifact.spec.width],
            **about,
            **ours.as_record(),
            **{name: metrics(own, threshold) for name, threshold in thresholds.items()},
        },
        "difference": {border: difference((own, mine[border]), (result, best[border]), border) for border in Border},
    }


@dataclass(eq=False)
class Timed:
    """A model that records the duration of each call, from the resized photo to the output."""

    run: Run
    seconds: list[float] = field(default_factory=list)

    def __call__(self, batch: U8) -> U8:
        start = time.perf_counter()
        answer = self.run(batch)
        self.seconds.append(round(time.perf_counter() - start, 5))
        return answer

    def as_record(self) -> dict[str, Any]:
        """Return the seconds of each call, and their median."""
        return {"seconds": self.seconds, "median": median(self.seconds)}
