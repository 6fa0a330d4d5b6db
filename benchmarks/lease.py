"""Train a recipe, round its weights, measure the rounded file and pack it: all that one lease of a GPU has time for.

    python -m benchmarks.lease photos data lease-data --size 256x256
    python -m benchmarks.lease published --data lease-data --out lease --size 256x256 --minutes 8 --no-tests
    python -m benchmarks.lease join lease/published.manifest.json petseg/weights/published.safetensors
    python -m benchmarks.lease measure lease/published.json petseg/weights/published.safetensors --data data

The first and the last two run at home: what is sent are the photos to train on, at the size they are trained at, and
the very file that came back is measured on all test photos here. Where all of ``data`` is at hand, neither is needed.
petseg need not be installed there: ``PYTHONPATH=.:export:runtime``. Where there is no git, give ``--commit HASH``.

The run is `petseg train`'s own, in a folder that is thrown away with its optimizer. What stays in OUT is small: the
weights in pieces of at most 15 MiB with their manifest, and RECIPE.json, a record as those in ``results/training``. The
pieces are there from the first validation on, and replaced by better ones: a lease that is cut off has left those.

Kernels are rounded to float16. Biases and BatchNorm's scales, shifts and statistics stay in float32: they are a few
thousandths of the bytes, and a variance can lie outside of what float16 holds. So does a kernel that would overflow.
The figures in the record are those of the rounded file, which is the original from then on.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import torch
from PIL import Image
from torch import Tensor

from benchmarks import photos, records
from benchmarks.embedded.ship import trained
from benchmarks.thresholds import at_each, best_of_each
from benchmarks.training import SPARE, few
from petseg import checkpoint, recipes
from petseg.config import TrainConfig, from_dict, override
from petseg.data import Pair, Split, find, read_pair, resize_trimap
from petseg.device import pick_device
from petseg.evaluate import Evaluation, OpenedModel, evaluate, open_model
from petseg.metrics import Border
from petseg.observers import Observer
from petseg.reference import torch_run
from petseg.run_state import BEST, QUICK_SAVE, RunState
from petseg.train import Trainer
from petseg_runtime import images
from petseg_runtime.cli.text import PATH, parse_size
from petseg_runtime.errors import DataError, PetsegError
from petseg_runtime.files import staging, write_atomic

PIECE: Final = 15 * 2**20  # what brings files home may take less than 16 MiB
#: Seconds between looks at whether a run has a better checkpoint; those that one which is told to stop has for it.
LOOK: Final = 20.0
STOPPING: Final = 45.0
#: Steps of a warm-up epoch, of which the later half is timed: the batches that were made before the first are used up.
STEPS: Final = 60
#: Seconds from `petseg train` to its first photo: Python, torch, CUDA.
START: Final = 20.0
#: Seconds from its last photo to its end: curves, pictures.
FINISH: Final = 15.0
#: What saving adds to the time of a run at most, where a state takes longer than QUICK_SAVE (petseg.run_state).
SAVING: Final = 1.1
MARGIN: Final = 0.06  # share of the time that is kept back
BATCH: Final = 16  # photos at a time, in the measurement
FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True)
class Job:
    """What is to be trained: `petseg train`'s options."""

    recipe: str
    root: Path
    device: str
    settings: tuple[str, ...]
    files: Mapping[str, Path]

    def config(self) -> TrainConfig:
        """The run, as `petseg train` will see it."""
        raw = recipes.load(self.recipe)
        for setting in self.settings:
            override(raw, setting)
        return from_dict(TrainConfig, raw)

    def words(self, output: Path) -> list[str]:
        """The command line."""
        words = [sys.executable, "-m", "petseg.cli", "train", "--recipe", self.recipe, "--device", self.device]
        words += ["--data", str(self.root), "--output", str(output)]
        words += [word for name, file in self.files.items() for word in (f"--{name}", str(file))]
        return words + [word for setting in self.settings for word in ("--set", setting)]


@click.command()
@click.argument("recipe", type=click.Choice(recipes.names()))
@click.option("--data", type=PATH, required=True, help="Folder of the data sets.")
@click.option("--out", type=PATH, required=True, help="Where the pieces and the record go.")
@click.option("--teacher", type=FILE)
@click.option("--init", type=FILE)
@click.option("--size", metavar="HxW")
@click.option("--epochs", type=click.IntRange(min=1), help="With --minutes, at most.  [default: the recipe's]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="As many epochs as end in this time.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="As of `petseg train`.")
@click.option("--device", default="auto", show_default=True)
@click.option("--commit", help="Of this checkout, where git cannot tell.")
@click.option("--no-tests", is_flag=True, help="Test photos are elsewhere: see `measure`.")
def lease(
    recipe: str,
    data: Path,
    out: Path,
    teacher: Path | None,
    init: Path | None,
    size: str | None,
    epochs: int | None,
    minutes: float | None,
    settings: tuple[str, ...],
    device: str,
    commit: str | None,
    no_tests: bool,
) -> None:
    """Train RECIPE, and leave in OUT what is to be brought home."""
    began = time.perf_counter()
    records.checkout()  # of the code that runs, before others commit more
    files = {name: file.absolute() for name, file in (("teacher", teacher), ("init", init)) if file}
    asked = {"size": size, "epochs": epochs, "minutes": minutes, **{name: file.name for name, file in files.items()}}
    words = [f"--{name} {value}" for name, value in asked.items() if value] + [f"--set {each}" for each in settings]
    words += ["--no-tests"] if no_tests else []
    command = " ".join([f"python -m benchmarks.lease {recipe} --data DATA --out OUT", *words])
    sides = zip(("height", "width"), parse_size(size), strict=True) if size else ()
    settings += (*(f"data.{name}={value}" for name, value in sides), *([f"epochs={epochs}"] if epochs else ()))
    root = photos.first(data.absolute(), photos.BEST, photos.OFFICIAL, photos.COPIES)
    job = Job(recipe, root, device, settings, files)
    # What is wrong is found now, not after the run.
    tests = {} if no_tests else tests_in(data)
    out.mkdir(parents=True, exist_ok=True)
    record = out / f"{recipe}.json"
    with tempfile.TemporaryDirectory() as scratch:
        plan = planned(job, Path(scratch), tests, 60 * minutes, began) if minutes else None
        if plan:
            job = replace(job, settings=(*settings, *shortened(job.config(), plan["epochs"])))
        run, weights = Path(scratch) / recipe, Path(scratch) / f"{recipe}.safetensors"
        left = began + plan["deadline"] - time.perf_counter() if plan else math.inf
        code = train(job, run, left, lambda best: pack(rounded(best, weights, commit), out))
        told = {"commit": commit} if commit else {}
        values: dict[str, Any] = {**told, "exit_code": code, "plan": plan}
        values["weights"] = pack(rounded(run / BEST, weights, commit), out)
        values["runs"] = [{**trained([run])[0], **told}]
        records.write(recipe, command, values, record)  # whatever becomes of the measurement
        values |= validated(weights, job)
        values |= measured(weights, device, values["thresholds"], tests)
    records.write(recipe, command, {**values, "seconds": time.perf_counter() - began}, record)
    say(values["tests"])
    sys.exit(code)


def tests_in(data: Path) -> dict[str, list[Pair]]:
    """Test photos with their truth, by what is told of them."""
    return {what: find(folder, Split.TEST) for what, folder in photos.test_sets(data).items()}


def say(tests: Mapping[str, Mapping[str, Any]]) -> None:
    """The headline of each set of test photos."""
    for what, found in tests.items():
        click.echo(f"{what}: IoU {found['iou']:.4f}, Dice {found['dice']:.4f}")


class Clock(Observer):
    """Seconds from the start of the latest epoch to the end of each of its steps, without validation."""

    def __init__(self) -> None:
        self.marks = [0.0]

    def step(self, state: RunState, loss: float, lr: float) -> None:
        self.marks = [*self.marks[: state.steps_summed], state.seconds]


def planned(
    job: Job, folder: Path, tests: Mapping[str, Sequence[Pair]], seconds: float, began: float
) -> dict[str, Any]:
    """How many epochs fit, what that follows from, and the second at which the run is stopped if it does not."""
    config = job.config()
    fraction, seed = config.data.val_fraction, config.data.split_seed
    train, val = (len(find(job.root, part, val_fraction=fraction, seed=seed)) for part in (Split.TRAIN, Split.VAL))
    costs = warmed_up(job, config, folder, train, val)
    left = seconds * (1 - MARGIN) - (time.perf_counter() - began)
    after = costs["measure_a_photo"] * (sum(map(len, tests.values())) + val)
    before = START + costs["read_a_photo"] * (train + val) + costs["first_epoch_more"] + FINISH + costs["save"]
    epoch = costs["epoch_start"] + costs["step"] * (train // config.batch) + costs["validate_and_save"]
    epoch *= SAVING if costs["save"] > QUICK_SAVE else 1
    epochs = min(config.epochs, int((left - before - after) / epoch))
    said = f"an epoch takes {epoch:.1f} s, all around them {before:.0f} s, and the measurement {after:.0f} s"
    if epochs < 1:
        sys.exit(f"no epoch fits into the {left:.0f} s that are left: {said}")
    click.echo(f"{epochs} epochs: {said}", err=True)
    click.echo(", ".join(f"{name} {value:.3g} s" for name, value in costs.items()), err=True)
    deadline = seconds * (1 - MARGIN / 2) - after
    return {"epochs": epochs, "epoch": epoch, "before": before, "after": after, "deadline": deadline, **costs}


def shortened(config: TrainConfig, epochs: int) -> list[str]:
    """The settings of a run of fewer epochs than its recipe's: restarts would leave its rate high at its end."""
    restarts = epochs < config.epochs and config.schedule.name == "cosine-restarts"
    return [f"epochs={epochs}", *([f"schedule.restart_epochs={epochs}"] if restarts else [])]


def warmed_up(job: Job, config: TrainConfig, folder: Path, train: int, val: int) -> dict[str, float]:
    """Seconds that the parts of a run take here, from two epochs over some of the photos and as many of validation."""
    some = min(train + val, STEPS * config.batch + val + SPARE)
    few(job.root, folder / "few", some)
    # The second epoch is the one that is timed: it has all of what takes longer, for no run may be planned too long.
    augment, share = replace(config.augment, mix_until=1.0), replace(config.data, val_fraction=val / some)
    short = replace(config, epochs=2, early_stop=0, augment=augment, data=share)
    device, clock = pick_device(job.device), Clock()
    torch.zeros(1, device=device)  # CUDA's own start is in START
    begin = time.perf_counter()
    init, teacher = job.files.get("init"), job.files.get("teacher")
    trainer = Trainer(
        short, folder / "few", folder / "warm-up", device=device, init=init, teacher=teacher, observer=clock
    )
    read = time.perf_counter() - begin
    trainer.fit()
    begin = time.perf_counter()
    side = (config.data.height, config.data.width)
    evaluate(torch_run(trainer.model, device), trainer.photos.good_val, *side, batch=BATCH)
    measure = time.perf_counter() - begin
    first, second = trainer.state.history
    assert first.elapsed is not None
    assert second.elapsed is not None
    steps = len(clock.marks) - 1
    step = (clock.marks[-1] - clock.marks[steps // 2]) / (steps - steps // 2)  # of the later half, in full swing
    save = trainer.last.took
    del trainer  # what it holds of the GPU's memory is the run's
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "read_a_photo": read / some,
        "first_epoch_more": max(0.0, first.seconds - second.seconds),
        "epoch_start": max(0.0, second.seconds - step * steps),
        "step": step,
        "validate_and_save": second.elapsed - first.elapsed - second.seconds,
        "save": save,
        "measure_a_photo": measure / val,
    }


def train(job: Job, run: Path, seconds: float, keep: Callable[[Path], object]) -> int:
    """Run `petseg train`; one that is not done in time is stopped, and its best checkpoint so far counts.

    ``keep`` is given that of a run under way whenever it is found to be another one.
    """
    end, kept = time.monotonic() + seconds, 0
    with subprocess.Popen(job.words(run), cwd=records.ROOT) as process:
        while process.poll() is None and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(LOOK, left))
            if (run / BEST).exists() and (now := (run / BEST).stat().st_mtime_ns) != kept:
                try:
                    keep(run / BEST)
                except (OSError, PetsegError) as error:  # the run goes on, and what it ends with is kept once more
                    click.echo(f"{run / BEST}: not kept ({error})", err=True)
                kept = now
        code = stopped(process)
    if not (run / BEST).exists():
        sys.exit(f"`petseg train` ended with exit code {code}, and left no checkpoint")
    return code


def stopped(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a run, which is told to stop if it has not ended; one that hangs is killed: files are whole."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def rounded(best: Path, to: Path, commit: str | None = None) -> Path:
    """Write a checkpoint's kernels in float16, and all else as it is."""
    loaded = checkpoint.load(best)
    origin = {**loaded.meta["provenance"], **({"commit": commit} if commit else {})}
    meta = {**loaded.meta, "provenance": origin, "rounded": {"kernels": "float16", "from_sha256": loaded.sha256}}
    checkpoint.save_checkpoint(to, {name: _half(tensor) for name, tensor in loaded.tensors.items()}, meta)
    return to


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.ndim > 1 and bool(half.isfinite().all()) else tensor


def validated(weights: Path, job: Job) -> dict[str, Any]:
    """The validation photos, and for each reading of the border the threshold that is best there."""
    split = job.config().data
    pairs = find(job.root, Split.VAL, val_fraction=split.val_fraction, seed=split.split_seed)
    with open_model(weights, job.device) as model:
        result = evaluated(model, pairs)
        return {
            "model": model.describe(),
            "validation": result.summary(model.threshold),
            "thresholds": best_of_each(result),
        }


def measured(
    weights: Path, device: str, thresholds: Mapping[Border, float], tests: Mapping[str, Sequence[Pair]]
) -> dict[str, Any]:
    """Each set of test photos at the file's own threshold, and each reading of the border at that of validation."""
    found, failed = {}, []
    with open_model(weights, device) as model:
        for what, pairs in tests.items():
            result = evaluated(model, pairs, lambda pair, _: failed.append(pair.name))
            best = at_each(result, thresholds)
            found[what] = {**result.summary(model.threshold), "at_thresholds_of_validation": best}
    return {"tests": found, "photos_failed": failed}


def evaluated(
    model: OpenedModel, pairs: Sequence[Pair], failed: Callable[[Pair, DataError], None] | None = None
) -> Evaluation:
    """What it makes of the photos; see :func:`petseg.evaluate.evaluate`."""
    return evaluate(model.run, pairs, model.height, model.width, batch=BATCH, failed=failed)


@click.command()
@click.argument("record", type=FILE)
@click.argument("weights", type=FILE)
@click.option("--data", type=PATH, required=True, help="Folder of the data sets.")
@click.option("--device", default="auto", show_default=True)
def measure(record: Path, weights: Path, data: Path, device: str) -> None:
    """Put into RECORD, of a lease without test photos, what its WEIGHTS reach on them."""
    values = json.loads(record.read_text(encoding="utf-8"))
    if values["weights"] != values["weights"] | _told(weights.read_bytes()):
        sys.exit(f"{weights}: not the file that {record.name} is of")
    values |= measured(weights, device, values["thresholds"], tests_in(data))
    values["tests_measured_on"] = {"machine": records.machine(), "versions": records.versions()}
    write_atomic(record, (json.dumps(values, indent=2) + "\n").encode())
    say(values["tests"])


@click.command(name="photos")
@click.argument("data", type=PATH)
@click.argument("out", type=PATH)
@click.option("--size", metavar="HxW", required=True, help="At which they will be trained on.")
@click.option("--quality", type=click.IntRange(1, 95), default=85, show_default=True, help="Of JPEG.")
def send(data: Path, out: Path, size: str, quality: int) -> None:
    """Write the photos to train on, of DATA, to OUT as data set of the same name, none larger than SIZE."""
    root = photos.first(data.absolute(), photos.BEST, photos.OFFICIAL, photos.COPIES)
    height, width = parse_size(size)
    folder = out / root.name
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    for pair in find(root, Split.TRAINVAL):
        photo, trimap = read_pair(pair)
        image, mask = folder / "images" / f"{pair.name}.jpg", folder / "annotations" / "trimaps" / f"{pair.name}.png"
        if photo.shape[0] <= height and photo.shape[1] <= width:
            shutil.copyfile(pair.image, image)
        else:  # as training would
            Image.fromarray(images.to_model(photo, height, width)).save(image, quality=quality)
            trimap = resize_trimap(trimap, height, width)
        Image.fromarray(trimap).save(mask, optimize=True)
    shutil.copyfile(root / "annotations" / "trainval.txt", folder / "annotations" / "trainval.txt")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    click.echo(f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def pack(weights: Path, out: Path) -> dict[str, Any]:
    """Write a file in pieces, and their manifest, which :func:`join` reads: all of them anew, or none."""
    data = weights.read_bytes()
    pieces: list[dict[str, Any]] = []
    with staging(out / f"{weights.stem}.manifest.json") as beside:
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            pieces.append({"file": f"{weights.name}.{len(pieces):02d}", **_told(piece)})
            write_atomic(beside / pieces[-1]["file"], piece)
        manifest = {"file": weights.name, **_told(data), "pieces": pieces}
        write_atomic(beside / f"{weights.stem}.manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


@click.command()
@click.argument("manifest", type=FILE)
@click.argument("out", type=PATH)
def join(manifest: Path, out: Path) -> None:
    """Put the pieces that MANIFEST names, and lie beside it, together to the file OUT."""
    told = json.loads(manifest.read_text(encoding="utf-8"))
    parts = [(manifest.parent / row["file"]).read_bytes() for row in told["pieces"]]
    whole = b"".join(parts)
    for row, part in zip((*told["pieces"], told), (*parts, whole), strict=True):
        if row != row | _told(part):
            sys.exit(f"{manifest.parent / row['file']}: not what {manifest.name} says it is; bring it once more")
    write_atomic(out, whole)
    click.echo(f"{out}: {told['sha256']}")


def _told(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    commands = {"join": join, "measure": measure, "photos": send}
    if command := commands.get("".join(sys.argv[1:2])):
        command(sys.argv[2:])
    else:
        lease(sys.argv[1:])
