"""Collect the trainval photos at the largest available size, for the second stage of the built-in model.

    python -m benchmarks.embedded.merge data data/oxford-iiit-pet-best

takes, for each trainval photo of the 128 x 128 copies, the original photo with its original trimap if available, else
a larger photo with the 128 x 128 trimap enlarged (nearest), else the copy itself. Test photos are never taken: the
program exits if a name of either test list is among them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import click
from PIL import Image


def names(folder: Path, split: str) -> list[str]:
    lines = (folder / "annotations" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def merge(root: Path, output: Path) -> Counter[str]:
    small, native, extra = (root / f"oxford-iiit-pet-{part}" for part in ("128", "native", "extra-images"))
    trainval = names(small, "trainval")
    test = set(names(small, "test")) | set(names(native, "test"))
    if leaked := test & set(trainval):
        raise SystemExit(f"in both trainval and test: {sorted(leaked)}")
    originals = set(names(native, "trainval"))
    (output / "images").mkdir(parents=True)
    (output / "annotations" / "trimaps").mkdir(parents=True)
    shutil.copy(small / "annotations" / "trainval.txt", output / "annotations")
    taken: Counter[str] = Counter()
    for name in trainval:
        photo = extra / "images" / f"{name}.jpg"
        if name in originals:
            kind, photo, trimap = "original", native / "images" / f"{name}.jpg", native
        elif photo.exists():
            kind, trimap = "larger photo, 128 x 128 trimap", small
        else:
            kind, photo, trimap = "128 x 128 copy", small / "images" / f"{name}.jpg", small
        taken[kind] += 1
        shutil.copy(photo, output / "images")
        with Image.open(trimap / "annotations" / "trimaps" / f"{name}.png") as mask, Image.open(photo) as image:
            mask.resize(image.size, Image.Resampling.NEAREST).save(output / "annotations" / "trimaps" / f"{name}.png")
    return taken


@click.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
def main(root: Path, output: Path) -> None:
    """Merge the data sets in the folder ROOT into the new folder OUTPUT."""
    for kind, count in merge(root, output).items():
        click.echo(f"{count:5d}  {kind}")


if __name__ == "__main__":
    main()
