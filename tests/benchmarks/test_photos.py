"""The benchmarks run on the official data set, or on the folders that replace it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import photos


def folders(data: Path, *names: str) -> Path:
    for name in names:
        (data / name / "images").mkdir(parents=True)
    return data


def test_the_official_set_is_enough(tmp_path: Path) -> None:
    official = folders(tmp_path, "oxford-iiit-pet") / "oxford-iiit-pet"
    assert photos.training_set(tmp_path) == photos.original_size(tmp_path) == official
    assert photos.original_size_folders(tmp_path) == [official / "images"]
    assert photos.test_sets(tmp_path) == {"3669 test images at their original size": official}


def test_the_folders_of_our_records_take_precedence(tmp_path: Path) -> None:
    every = ("", "-128", "-native", "-extra-images", "-best")
    folders(tmp_path, *(f"oxford-iiit-pet{part}" for part in every))
    assert photos.training_set(tmp_path).name == "oxford-iiit-pet-best"
    assert photos.original_size(tmp_path).name == "oxford-iiit-pet-native"
    assert [folder.parent.name for folder in photos.original_size_folders(tmp_path)] == [photos.NATIVE, photos.EXTRA]
    assert [folder.name for folder in photos.test_sets(tmp_path).values()] == [
        photos.COPIES,
        photos.NATIVE,
        photos.OFFICIAL,
    ]


def test_chosen_photos_are_spread_over_the_set(tmp_path: Path) -> None:
    folder = folders(tmp_path, photos.NATIVE) / photos.NATIVE / "images"
    for number in range(9):
        (folder / f"cat_{number}.jpg").touch()
    assert [path.stem for path in photos.chosen(tmp_path, 3)] == ["cat_0", "cat_4", "cat_8"]


@pytest.mark.parametrize(
    "ask", [photos.training_set, photos.original_size, photos.original_size_folders, photos.test_sets]
)
def test_without_photos_the_error_gives_a_remedy(tmp_path: Path, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(SystemExit, match=r"contains no oxford-iiit-pet; run `petseg data download"):
        ask(tmp_path)
