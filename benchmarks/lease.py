"""Train a recipe on a leased GPU, round the weights to float16, measure the rounded file and pack it for transfer.

    python -m benchmarks.lease photos data lease-data --size 256x256
    python -m benchmarks.lease published --data lease-data --out lease --size 256x256 --minutes 8 --no-tests
    python -m benchmarks.lease join lease/published.manifest.json petseg/weights/published.safetensors
    python -m benchmarks.lease measure lease/published.json petseg/weights/published.safetensors --data data

The second command runs on the GPU machine, the others at home. ``photos`` makes a small data set to send: the
training photos at the training size. ``measure`` measures the very file that came back on all test photos. If the GPU
machine has all of ``data``, neither is needed. petseg need not be installed there: set ``PYTHONPATH=.:export:runtime``.
Without git, pass ``--commit HASH``. ``petseg/weights`` is not needed there, unless a file of it is given as --teacher
or --init.

The run is a `petseg train` in a temporary folder, which is deleted with the optimizer state. OUT stays small: the
weights in pieces of at most 15 MiB with a manifest, and RECIPE.json, a record like those in ``results/training``. The
pieces are written after the first validation and replaced by better ones, so a lease that is cut off leaves the best
weights so far.

Kernels are rounded to float16. Biases and the scales, shifts and statistics of BatchNorm stay in float32: they are a
few thousandths of the bytes, and a variance can lie outside the range of float16. A kernel that would overflow stays in
float32, too. The figures in the record are those of the rounded file, which is the original from then on.
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
from benchmarks.training import SPARE, make_subset
from petseg import checkpoint, recipes
from petseg.config import DataConfig, TrainConfig, from_dict, override
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

PIECE: Final = 15 * 2**20  # the transfer home may limit files to less than 16 MiB
#: Seconds between checks for a better checkpoint.
LOOK: Final = 20.0
#: Seconds that an interrupted run has to stop before it is killed.
STOPPING: Final = 45.0
#: Steps of a warm-up epoch; the second half is timed, after the prefetched batches are used up.
STEPS: Final = 60
#: Seconds from the start of `petseg train` to its first photo: Python, torch, CUDA.
START: Final = 20.0
#: Seconds from its last photo to its end: curves, pictures.
FINISH: Final = 15.0
#: Largest factor by which saving lengthens a run whose state takes longer than QUICK_SAVE (petseg.run_state).
SAVING: Final = 1.1
MARGIN: Final = 0.06  # share of the time kept in reserve
BATCH: Final = 16  # batch size of the measurement
FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True)
class Job:
    """A training run: the options of `petseg train`."""

    recipe: str
    root: Path
    device: str
    settings: tuple[str, ...]
    files: Mapping[str, Path]

    def config(self) -> TrainConfig:
        """The config of the run, as `petseg train` resolves it."""
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
@click.option("--out", type=PATH, required=True, help="Folder for the pieces and the record.")
@click.option("--teacher", type=FILE, help="As in `petseg train`.")
@click.option("--init", type=FILE, help="As in `petseg train`.")
@click.option("--size", metavar="HxW", help="Training size.  [default: the recipe's]")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Upper limit if --minutes is given.  [default: the recipe's]"
)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Train as many epochs as fit in this time."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="As in `petseg train`.")
@click.option("--device", default="auto", show_default=True)
@click.option("--commit", help="Commit of this checkout, where git cannot tell it.")
@click.option("--no-tests", is_flag=True, help="There are no test photos here: run `measure` at home.")
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
    """Train RECIPE, and leave the files to bring home in OUT."""
    began = time.perf_counter()
    records.checkout()  # cached now, before someone commits during the run
    files = {name: file.absolute() for name, file in (("teacher", teacher), ("init", init)) if file}
    asked = {"size": size, "epochs": epochs, "minutes": minutes, **{name: file.name for name, file in files.items()}}
    words = [f"--{name} {value}" for name, value in asked.items() if value] + [f"--set {each}" for each in settings]
    words += ["--no-tests"] if no_tests else []
    command = " ".join([f"python -m benchmarks.lease {recipe} --data DATA --out OUT", *words])
    sides = zip(("height", "width"), parse_size(size), strict=True) if size else ()
    settings += (*(f"data.{name}={value}" for name, value in sides), *([f"epochs={epochs}"] if epochs else ()))
    root = photos.first(data.absolute(), photos.BEST, photos.OFFICIAL, photos.COPIES)
    job = Job(recipe, root, device, settings, files)
    tests = {} if no_tests else tests_in(data)  # before the run, so that missing photos are found now
    out.mkdir(parents=True, exist_ok=True)
    record = out / f"{recipe}.json"
    with tempfile.TemporaryDirectory() as scratch:
        plan = planned(job, Path(scratch), tests, 60 * minutes, began) if minutes else None
        if plan:
            job = replace(job, settings=(*settings, *shortened(job.config(), plan["epochs"])))
        run, weights = Path(scratch) / recipe, Path(scratch) / f"{recipe}.safetensors"
        left = began + plan["deadline"] - time.perf_counter() if plan else math.inf
        code = train(job, run, left, lambda best: pack(rounded(best, weights, commit), out))
        origin = {"commit": commit} if commit else {}
        values: dict[str, Any] = {**origin, "exit_code": code, "plan": plan}
        values["weights"] = pack(rounded(run / BEST, weights, commit), out)
        values["runs"] = [{**trained([run])[0], **origin}]
        records.write(recipe, command, values, record)  # now, in case the measurement fails
        values |= validated(weights, job.root, job.config().data, device)
        values |= measured(weights, device, values["thresholds"], tests)
    records.write(recipe, command, {**values, "seconds": time.perf_counter() - began}, record)
    say(values["tests"])
    sys.exit(code)


def tests_in(data: Path) -> dict[str, list[Pair]]:
    """Labelled test photos, by the description of their set."""
    return {what: find(folder, Split.TEST) for what, folder in photos.test_sets(data).items()}


def say(tests: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the headline metrics of each set of test photos."""
    for what, found in tests.items():
        click.echo(f"{what}: IoU {found['iou']:.4f}, Dice {found['dice']:.4f}")


class Clock(Observer):
    """Records the seconds from the start of the latest epoch to the end of each of its steps, without validation."""

    def __init__(self) -> None:
        self.marks = [0.0]

    def step(self, state: RunState, loss: float, lr: float) -> None:
        self.marks = [*self.marks[: state.steps_summed], state.seconds]


def planned(
    job: Job, folder: Path, tests: Mapping[str, Sequence[Pair]], seconds: float, began: float
) -> dict[str, Any]:
    """Plan the number of epochs that fit into the time, and the second at which an unfinished run is stopped."""
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
    parts = f"an epoch takes {epoch:.1f} s, start and finish {before:.0f} s, and the measurement {after:.0f} s"
    if epochs < 1:
        sys.exit(f"no epoch fits into the {left:.0f} s that are left: {parts}")
    click.echo(f"{epochs} epochs: {parts}", err=True)
    click.echo(", ".join(f"{name} {value:.3g} s" for name, value in costs.items()), err=True)
    deadline = seconds * (1 - MARGIN / 2) - after
    return {"epochs": epochs, "epoch": epoch, "before": before, "after": after, "deadline": deadline, **costs}


def shortened(config: TrainConfig, epochs: int) -> list[str]:
    """The settings for fewer epochs than the recipe's; one restart cycle, so that the learning rate ends low."""
    restarts = epochs < config.epochs and config.schedule.name == "cosine-restarts"
    return [f"epochs={epochs}", *([f"schedule.restart_epochs={epochs}"] if restarts else [])]


def warmed_up(job: Job, config: TrainConfig, folder: Path, train: int, val: int) -> dict[str, float]:
    """Measure the seconds of each part of a run, in two epochs over some photos, ``val`` of them for validation."""
    some = min(train + val, STEPS * config.batch + val + SPARE)
    make_subset(job.root, folder / "few", some)
    # The second epoch is timed. Mixing stays on in it, so that the time of an epoch is not underestimated.
    augment, share = replace(config.augment, mix_until=1.0), replace(config.data, val_fraction=val / some)
    short = replace(config, epochs=2, early_stop=0, augment=augment, data=share)
    device, clock = pick_device(job.device), Clock()
    torch.zeros(1, device=device)  # CUDA's initialization is part of START
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
    steps = len(clock.marks) - 1
    step = (clock.marks[-1] - clock.marks[steps // 2]) / (steps - steps // 2)  # the second half, at steady state
    save = trainer.last.took
    del trainer  # frees its GPU memory for the run
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
    """Run `petseg train`, and interrupt it if it is not done in time: then its best checkpoint so far counts.

    While the run goes on, ``keep`` is called with the best checkpoint whenever that has changed.
    """
    end, kept = time.monotonic() + seconds, 0
    with subprocess.Popen(job.words(run), cwd=records.ROOT) as process:
        while process.poll() is None and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(LOOK, left))
            if (run / BEST).exists() and (now := (run / BEST).stat().st_mtime_ns) != kept:
                try:
                    keep(run / BEST)
                except (OSError, PetsegError) as error:  # the run goes on, and its final checkpoint is kept anyway
                    click.echo(f"{run / BEST}: not kept ({error})", err=True)
                kept = now
        code = stopped(process)
    if not (run / BEST).exists():
        sys.exit(f"`petseg train` ended with exit code {code} and left no checkpoint")
    return code


def stopped(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a run that has not ended, kill it if it hangs (its files are complete), and return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def rounded(best: Path, to: Path, commit: str | None = None) -> Path:
    """Write a copy of a checkpoint with its kernels in float16 and everything else unchanged."""
    loaded = checkpoint.load(best)
    origin = {**loaded.meta["provenance"], **({"commit": commit} if commit else {})}
    meta = {**loaded.meta, "provenance": origin, "rounded": {"kernels": "float16", "from_sha256": loaded.sha256}}
    checkpoint.save_checkpoint(to, {name: _half(tensor) for name, tensor in loaded.tensors.items()}, meta)
    return to


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.ndim > 1 and bool(half.isfinite().all()) else tensor


def validated(weights: Path, root: Path, split: DataConfig, device: str) -> dict[str, Any]:
    """Measure on the validation photos, and find the best threshold there for each reading of the border."""
    pairs = find(root, Split.VAL, val_fraction=split.val_fraction, seed=split.split_seed)
    with open_model(weights, device) as model:
        result = evaluated(model, pairs)
        return {
            "model": model.describe(),
            "validation": result.summary(model.threshold),
            "thresholds": best_of_each(result),
        }


def measured(
    weights: Path, device: str, thresholds: Mapping[Border, float], tests: Mapping[str, Sequence[Pair]]
) -> dict[str, Any]:
    """Measure each set of test photos, at the file's threshold and at validation's for each reading of the border."""
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
    """Evaluate a model on photos; see :func:`petseg.evaluate.evaluate`."""
    return evaluate(model.run, pairs, model.height, model.width, batch=BATCH, failed=failed)


@click.command()
@click.argument("record", type=FILE)
@click.argument("weights", type=FILE)
@click.option("--data", type=PATH, required=True, help="Folder of the data sets.")
@click.option("--device", default="auto", show_default=True)
def measure(record: Path, weights: Path, data: Path, device: str) -> None:
    """Measure WEIGHTS on the test photos, and add the result to RECORD, of a lease that had none."""
    values = json.loads(record.read_text(encoding="utf-8"))
    if values["weights"] != values["weights"] | _size_and_digest(weights.read_bytes()):
        sys.exit(f"{weights}: not the file that {record.name} describes")
    values |= measured(weights, device, values["thresholds"], tests_in(data))
    values["tests_measured_on"] = {"machine": records.machine(), "versions": records.versions()}
    write_atomic(record, (json.dumps(values, indent=2) + "\n").encode())
    say(values["tests"])


@click.command(name="photos")
@click.argument("data", type=PATH)
@click.argument("out", type=PATH)
@click.option("--size", metavar="HxW", required=True, help="Training size.")
@click.option("--quality", type=click.IntRange(1, 95), default=85, show_default=True, help="JPEG quality.")
def send(data: Path, out: Path, size: str, quality: int) -> None:
    """Write the training photos of DATA, none larger than SIZE, to OUT as a data set of the same name."""
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
        else:  # resized as in training
            Image.fromarray(images.to_model(photo, height, width)).save(image, quality=quality)
            trimap = resize_trimap(trimap, height, width)
        Image.fromarray(trimap).save(mask, optimize=True)
    shutil.copyfile(root / "annotations" / "trainval.txt", folder / "annotations" / "trainval.txt")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    click.echo(f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def pack(weights: Path, out: Path) -> dict[str, Any]:
    """Write a file in pieces with a manifest for :func:`join`; replaces all earlier pieces or, if it fails, none."""
    data = weights.read_bytes()
    pieces: list[dict[str, Any]] = []
    with staging(out / f"{weights.stem}.manifest.json") as beside:
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            pieces.append({"file": f"{weights.name}.{len(pieces):02d}", **_size_and_digest(piece)})
            write_atomic(beside / pieces[-1]["file"], piece)
        manifest = {"file": weights.name, **_size_and_digest(data), "pieces": pieces}
        write_atomic(beside / f"{weights.stem}.manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


@click.command()
@click.argument("manifest", type=FILE)
@click.argument("out", type=PATH)
def join(manifest: Path, out: Path) -> None:
    """Join the pieces that MANIFEST lists, and that lie beside it, to the file OUT."""
    listed = json.loads(manifest.read_text(encoding="utf-8"))
    parts = [(manifest.parent / row["file"]).read_bytes() for row in listed["pieces"]]
    joined = b"".join(parts)
    for row, part in zip((*listed["pieces"], listed), (*parts, joined), strict=True):
        if row != row | _size_and_digest(part):
            sys.exit(f"{manifest.parent / row['file']}: not the file that {manifest.name} describes; transfer it again")
    write_atomic(out, joined)
    click.echo(f"{out}: {listed['sha256']}")


def _size_and_digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    commands = {"join": join, "measure": measure, "photos": send}
    if command := commands.get("".join(sys.argv[1:2])):
        command(sys.argv[2:])
    else:
        lease(sys.argv[1:])
