from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import pet_free as module
from benchmarks.pet_free import LEAST_SIDE, named, package_of, pet_free, pictures_in, pictures_of


def picture(side: int = LEAST_SIDE, kind: str = "PNG", seed: int = 0) -> bytes:
    """A picture of noise, which stays large however it is compressed."""
    made = io.BytesIO()
    Image.effect_noise((side, side), 50 + seed).save(made, kind)
    return made.getvalue()


def resource_file(*items: bytes) -> bytes:
    """A file as Qt's rcc writes it: header, data, names, tree."""
    data = b"".join(struct.pack(">I", len(item)) + item for item in items)
    head = b"qres" + struct.pack(">IIIII", 3, 24 + len(data) + 9, 24, 24 + len(data), 0)
    return head + data + b"its names" + b"its tree"


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    return path


def test_the_names_in_the_record_are_grouped_by_package() -> None:
    record = {"photos/gradio/report": ["tower"], "animals/gradio/choose": ["lion"], "photos/imgaug/choose": ["q"]}
    assert named(record) == {"gradio": {"tower": "photos", "lion": "animals"}, "imgaug": {"q": "photos"}}


def test_a_package_is_found_by_its_name_and_version(tmp_path: Path) -> None:
    for name in ("mate-backgrounds_1.26.0-1_all.deb", "mate-desktop_1_all.deb"):
        (tmp_path / name).touch()
    assert package_of("mate-backgrounds", tmp_path).name == "mate-backgrounds_1.26.0-1_all.deb"
    with pytest.raises(click.ClickException, match="0 files of gradio"):
        package_of("gradio", tmp_path)
    (tmp_path / "mate-backgrounds_1.26.0-2_all.deb").touch()
    with pytest.raises(click.ClickException, match="2 files of mate-backgrounds"):
        package_of("mate-backgrounds", tmp_path)


def test_pictures_of_a_wheel_are_named_by_their_files(tmp_path: Path) -> None:
    lion, other = picture(), picture(seed=1)
    package = wheel(
        tmp_path / "zoo-1-py3.whl", zoo__lion_DOT_png=lion, zoo__tiger_DOT_png=other, lion_DOT_txt=b"x" * 99999
    )
    assert pictures_of(package, {"lion", "bear"}) == {"lion": lion}


def test_a_wallpaper_size_is_named_by_its_folder() -> None:
    contents = PurePosixPath("usr/share/wallpapers/Altai/contents")
    assert list(pictures_in(contents / "images" / "5120x2880.png", b"bytes")) == [("Altai", b"bytes")]
    assert list(pictures_in(contents / "images_dark" / "5120x2880.png", b"bytes")) == [("5120x2880", b"bytes")]


@pytest.mark.parametrize("first", [True, False])
def test_of_two_pictures_with_the_same_name_the_larger_is_used(tmp_path: Path, first: bool) -> None:
    small, large = picture(200), picture(300)
    both = (large, small) if first else (small, large)
    package = wheel(tmp_path / "zoo-1.whl", a__lion_DOT_png=both[0], b__lion_DOT_png=both[1])
    assert pictures_of(package, {"lion"}) == {"lion": large}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, and a record that names a picture of each."""
    folder = tmp_path / "packages"
    folder.mkdir()
    wheel(folder / "zoo-1-py3.whl", zoo__lion_DOT_png=picture(), zoo__cat_DOT_png=picture(seed=1))
    wheel(folder / "places-2-py3.whl", places__tower_DOT_png=picture(seed=2))
    wheel(folder / "places_of_others-2-py3.whl", places__tower_DOT_png=picture(seed=3))
    record = {"pet_free_photos": {"animals/zoo/choose": ["lion"], "photos/places/report": ["tower"]}}
    (tmp_path / "found.json").write_text(json.dumps(record))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return folder


def test_the_pictures_in_the_record_are_extracted(packages: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"animals/zoo/lion.jpg", "photos/places/tower.jpg"}
    assert (tmp_path / "out/photos/places/tower.jpg").read_bytes() == picture_in(packages / "places-2-py3.whl")
    again = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "not empty" in again.output


def picture_in(package: Path) -> bytes:
    with zipfile.ZipFile(package) as archive:
        return archive.read("places/tower.png")


def test_missing_and_damaged_packages_are_reported(packages: Path, tmp_path: Path) -> None:
    wheel(packages / "zoo-1-py3.whl", zoo__cat_DOT_png=picture())
    done = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "zoo/lion" in done.output
    (packages / "zoo-1-py3.whl").write_bytes(b"no archive")
    done = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "zoo-1-py3.whl: cannot be read" in done.output
    (packages / "zoo-1-py3.whl").unlink()
    done = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "third")])
    assert "0 files of zoo" in done.output
    assert not (tmp_path / "third").exists(), "looked for before anything is written"


def compressed(content: bytes, name: str = "lion.png") -> bytes:
    """A wheel with one file, deflated."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return made.getvalue()


@pytest.mark.parametrize(
    "damaged",
    [
        re.sub(rb"(?<=lion.png)....", b"\xff" * 4, compressed(b"lion" * 999), count=1, flags=re.DOTALL),  # zlib.error
        compressed(gzip.compress(bytes(range(256)))[:40], "lion.puzzle"),  # EOFError
        compressed(b"qres" + struct.pack(">IIIII", 3, 0, 99, 0, 0), "lion.rcc"),  # ValueError
    ],
)
def test_a_damaged_file_in_a_package_is_reported(packages: Path, tmp_path: Path, damaged: bytes) -> None:
    (packages / "zoo-1-py3.whl").write_bytes(damaged)
    done = CliRunner().invoke(pet_free, [str(packages), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "zoo-1-py3.whl: cannot be read" in done.output, done.exception


def test_photos_in_a_resource_file_are_numbered_in_order() -> None:
    photos = [picture(kind="WEBP"), picture(seed=1), picture(kind="JPEG")]
    button, plain = picture(LEAST_SIDE - 1), io.BytesIO()
    Image.new("RGB", (400, 400)).save(plain, "PNG")  # large, but with hardly any content
    content = resource_file(photos[0], b"a text", button, photos[1], plain.getvalue(), photos[2])
    found = list(pictures_in(PurePosixPath("rcc/details.rcc"), content))
    assert found == [(f"details_{number:03}", photo) for number, photo in enumerate(photos)]


def test_the_picture_of_a_puzzle_is_found() -> None:
    made, photo = io.BytesIO(), picture()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in (("0.png", b"a piece"), ("image.jpg", photo)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert list(pictures_in(PurePosixPath("castle.puzzle"), made.getvalue())) == [("castle", photo)]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_pictures_of_a_debian_package(tmp_path: Path) -> None:
    root, photo = tmp_path / "root", picture()
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: zoo\nVersion: 1\nArchitecture: all\nMaintainer: nobody <a@b.c>\nDescription: none\n"
    )
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "lion.png").write_bytes(photo)
    package = tmp_path / "zoo_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(package)], check=True, capture_output=True)
    assert pictures_of(package, {"lion"}) == {"lion": photo}
