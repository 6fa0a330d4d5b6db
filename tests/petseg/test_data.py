from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from petseg import data as data_module
from petseg.data import (
    KEY_LENGTH,
    Layout,
    Pair,
    Split,
    check,
    find,
    find_listed,
    listed_validation,
    locate,
    photo_key,
    read_pair,
    read_trimap,
    usable,
    validation_names,
)
from petseg.metrics import PET
from petseg_runtime import images
from petseg_runtime.errors import DataError


def names(pairs: list[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


# finding


def test_both_layouts_are_told_apart(oxford_root: Path, folder_root: Path) -> None:
    assert locate(oxford_root) == (oxford_root, Layout.OXFORD)
    assert locate(folder_root) == (folder_root, Layout.FOLDER)


def test_the_sub_folder_of_torchvision_is_found(oxford_copy: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    oxford_copy.rename(outer / "oxford-iiit-pet")
    assert locate(outer) == (outer / "oxford-iiit-pet", Layout.OXFORD)
    assert len(find(outer, Split.TEST)) == 6


def test_no_data_set_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"no data set here.*annotations/trimaps.*masks"):
        find(tmp_path, Split.TRAIN)


@pytest.mark.parametrize("layout", ["oxford", "folder"])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_and_complete(layout: str, seed: int, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{layout}_root")
    train, val, trainval, test = (
        set(names(find(root, s, val_fraction=0.25, seed=seed)))
        for s in (Split.TRAIN, Split.VAL, Split.TRAINVAL, Split.TEST)
    )
    assert train | val == trainval
    assert not train & val
    assert not test & trainval
    assert len(val) == {"oxford": 6, "folder": 2}[layout]
    assert len(test) == {"oxford": 6, "folder": 3}[layout]


def test_pairs_are_sorted_and_their_files_exist(oxford_root: Path, folder_root: Path) -> None:
    for root in (oxford_root, folder_root):
        pairs = find(root, Split.TRAIN, val_fraction=0.25)
        assert names(pairs) == sorted(names(pairs))
        assert all(p.image.stem == p.mask.stem == p.name and p.image.is_file() and p.mask.is_file() for p in pairs)


def test_the_seed_alone_decides_what_is_validation(oxford_root: Path) -> None:
    def val(seed: int, fraction: float = 0.25) -> list[str]:
        return names(find(oxford_root, Split.VAL, val_fraction=fraction, seed=seed))

    assert val(0) == val(0)
    assert val(0) != val(1)
    assert len(val(0, 0.001)) == 1, "at least one"
    # These names are the same on every machine and for every Python: they are part of the contract.
    order = [f"pet_{i:02d}" for i in range(24)]
    assert validation_names(order, 0.125, 0) == {"pet_12", "pet_13", "pet_01"}
    assert validation_names(order[::-1], 0.125, 0) == validation_names(order, 0.125, 0)


def test_a_fraction_that_leaves_nothing_to_train_on_is_rejected(oxford_root: Path) -> None:
    with pytest.raises(DataError, match="train split has no photos: trainval needs at least one photo for training"):
        find(oxford_root, Split.TRAIN, val_fraction=0.999)


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_a_missing_listing_is_named(oxford_copy: Path, split: str) -> None:
    (oxford_copy / "annotations" / f"{split}.txt").unlink()
    with pytest.raises(DataError, match=rf"{split}\.txt: cannot be read"):
        find(oxford_copy, Split(split))


def test_a_listing_that_is_not_text_is_named(oxford_copy: Path) -> None:
    (oxford_copy / "annotations" / "trainval.txt").write_bytes(b"pet_\xff\xfe 1 1 1\n")
    with pytest.raises(DataError, match=r"trainval\.txt"):
        find(oxford_copy, Split.TRAIN)


def test_a_listing_with_comments_blanks_and_repetitions(oxford_copy: Path) -> None:
    (oxford_copy / "annotations" / "test.txt").write_text("# a b\n\npet_25 1 1 1\n  \npet_24\npet_25 1 1 1\n")
    assert names(find(oxford_copy, Split.TEST)) == ["pet_24", "pet_25"]


def test_an_empty_split_is_rejected(folder_copy: Path) -> None:
    (folder_copy / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test split has no photos: name some in .*/test\.txt, one on each line"):
        find(folder_copy, Split.TEST)
    assert len(find(folder_copy, Split.TRAINVAL)) == 12


def test_two_photos_of_one_stem_are_rejected(folder_copy: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder_copy / "images" / "own_03.jpg")
    with pytest.raises(DataError, match=r"own_03\.png and .*own_03\.jpg"):
        find(folder_copy, Split.TRAIN)


@pytest.mark.parametrize("suffix", [".gif", ".JPE", ".jfif", ".ppm", ".mpo"])
def test_what_can_be_segmented_can_be_trained_on(folder_copy: Path, suffix: str) -> None:
    for part in ("images", "masks"):
        path = folder_copy / part / "own_00.png"
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix), {".gif": "GIF", ".ppm": "PPM"}.get(suffix, "JPEG"))
        path.unlink()
    pairs = find(folder_copy, Split.TRAINVAL)
    assert len(pairs) == 9
    photo, trimap = read_pair(pairs[0])
    assert photo.shape == (64, 64, 3)
    assert (trimap == PET).any()


def test_hidden_and_foreign_files_are_skipped(folder_copy: Path) -> None:
    (folder_copy / "images" / ".own_00.png").write_bytes(b"")
    (folder_copy / "images" / "Thumbs.db").write_bytes(b"")
    assert len(find(folder_copy, Split.TRAINVAL)) == 9


def test_find_listed_joins_splits_and_skips_absent_ones(oxford_copy: Path) -> None:
    both = find_listed(oxford_copy, [Split.TRAINVAL, Split.TEST])
    assert {split: len(pairs) for split, pairs in both.items()} == {Split.TRAINVAL: 24, Split.TEST: 6}
    (oxford_copy / "annotations" / "test.txt").unlink()
    assert find_listed(oxford_copy, [Split.TRAINVAL, Split.TEST]).keys() == {Split.TRAINVAL}
    with pytest.raises(DataError, match="no photos are listed for test"):
        find_listed(oxford_copy, [Split.TEST])


@pytest.mark.parametrize("wrong", ["own_09.png", "own_99", "own_09 own_10", "# later"])
def test_a_test_photo_that_is_not_there_is_named_and_not_trained_on(folder_copy: Path, wrong: str) -> None:
    (folder_copy / "test.txt").write_text(f"own_11\n{wrong}\n")
    for split in Split:
        with pytest.raises(DataError, match=rf"test\.txt: 1 lines name no photo .*'{wrong}'.* without suffix"):
            find(folder_copy, split)


def test_names_of_the_test_photos_may_have_spaces_and_follow_a_byte_order_mark(folder_copy: Path) -> None:
    for part in ("images", "masks"):
        (folder_copy / part / "own_09.png").rename(folder_copy / part / "own 09.png")
    (folder_copy / "test.txt").write_text("own 09\n\n  \nown_10\n", encoding="utf-8-sig")
    assert names(find(folder_copy, Split.TEST)) == ["own 09", "own_10"]
    assert len(find(folder_copy, Split.TRAINVAL)) == 10


def test_a_name_that_begins_like_a_comment_is_a_test_photo_and_not_trained_on(folder_copy: Path) -> None:
    for part in ("images", "masks"):
        (folder_copy / part / "own_09.png").rename(folder_copy / part / "#1 rex.png")
    (folder_copy / "test.txt").write_text("#1 rex\nown_10\n")
    assert names(find(folder_copy, Split.TEST)) == ["#1 rex", "own_10"]
    assert "#1 rex" not in names(find(folder_copy, Split.TRAINVAL))


def test_val_txt_is_the_validation_part_whatever_share_and_seed_say(folder_copy: Path) -> None:
    assert listed_validation(folder_copy) is None
    (folder_copy / "val.txt").write_text("own_07\n \n\nown_02\n", encoding="utf-8-sig")
    assert listed_validation(folder_copy) == {"own_02", "own_07"}
    for fraction, seed in ((0.05, 0), (0.5, 3)):
        parts = {split: names(find(folder_copy, split, val_fraction=fraction, seed=seed)) for split in Split}
        assert parts[Split.VAL] == ["own_02", "own_07"]
        assert parts[Split.TRAIN] == [f"own_{i:02d}" for i in (0, 1, 3, 4, 5, 6, 8)]
        assert parts[Split.TRAINVAL] == [f"own_{i:02d}" for i in range(9)]
        assert parts[Split.TEST] == ["own_09", "own_10", "own_11"]
    (folder_copy / "test.txt").unlink()
    assert len(find(folder_copy, Split.TRAIN)) == 10


@pytest.mark.parametrize("wrong", ["own_07.png", "own_99", "own_07 own_08"])
def test_a_validation_photo_that_is_not_there_is_named_and_not_trained_on(folder_copy: Path, wrong: str) -> None:
    (folder_copy / "val.txt").write_text(f"own_02\n{wrong}\n")
    for split in Split:
        with pytest.raises(DataError, match=rf"val\.txt: 1 lines name no photo .*'{wrong}'.* without suffix"):
            find(folder_copy, split)


def test_a_photo_of_both_listings_is_named(folder_copy: Path) -> None:
    (folder_copy / "val.txt").write_text("own_02\nown_10\nown_09\n")
    for split in Split:
        with pytest.raises(DataError, match=r"val\.txt: 2 of its names are also in test\.txt, the first is 'own_09'"):
            find(folder_copy, split)


@pytest.mark.parametrize(("lines", "split"), [(range(0), Split.VAL), (range(9), Split.TRAIN)])
def test_a_listing_that_leaves_nothing_to_validate_or_train_on_is_named(
    folder_copy: Path, lines: range, split: Split
) -> None:
    (folder_copy / "val.txt").write_text("".join(f"own_{i:02d}\n" for i in lines))
    with pytest.raises(DataError, match=rf"the {split} split has no photos: .*val\.txt lists the validation photos"):
        find(folder_copy, split)


def test_oxfords_layout_has_no_val_txt(oxford_copy: Path) -> None:
    before = names(find(oxford_copy, Split.VAL))
    for folder in (oxford_copy, oxford_copy / "annotations"):
        (folder / "val.txt").write_text("pet_01\n")
    assert names(find(oxford_copy, Split.VAL)) == before
    assert listed_validation(oxford_copy) is None


def test_a_name_that_no_folder_can_have_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be looked into"):
        locate(tmp_path / ("x" * 300))


# reading


def trimap_pair(folder: Path, mask: np.ndarray | None, layout: Layout = Layout.OXFORD) -> Pair:
    path = folder / "mask.png"
    if mask is not None:
        Image.fromarray(mask).save(path)
    return Pair("mask", folder / "photo.png", path, layout)


def test_a_trimap_is_read_as_it_is(tmp_path: Path) -> None:
    mask = np.array([[1, 2, 3], [3, 2, 1]], np.uint8)
    read = read_trimap(trimap_pair(tmp_path, mask))
    assert read.dtype == np.uint8
    assert np.array_equal(read, mask)


@pytest.mark.parametrize("values", [[0, 1], [1, 4], [0, 255], [2, 0]])
def test_a_trimap_with_other_values_is_rejected(tmp_path: Path, values: list[int]) -> None:
    with pytest.raises(DataError, match=r"mask\.png: not a trimap"):
        read_trimap(trimap_pair(tmp_path, np.array([values], np.uint8)))


def test_a_colour_trimap_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mask\.png: not a trimap"):
        read_trimap(trimap_pair(tmp_path, np.ones((4, 4, 3), np.uint8)))


@pytest.mark.parametrize("layout", list(Layout))
def test_a_missing_foreign_or_truncated_mask_is_named(tmp_path: Path, layout: Layout) -> None:
    pair = trimap_pair(tmp_path, None, layout)
    with pytest.raises(DataError, match=r"mask\.png: .*\(a mask; `petseg data check` lists every such file\)"):
        read_trimap(pair)
    pair.mask.write_bytes(b"not an image at all")
    with pytest.raises(DataError, match=r"mask\.png: .*\(a mask; `petseg data check` lists every such file\)"):
        read_trimap(pair)
    rng = np.random.default_rng(0)
    whole = trimap_pair(tmp_path, rng.integers(1, 4, (64, 64)).astype(np.uint8)).mask.read_bytes()
    for length in range(0, len(whole) - 60, len(whole) // 40):
        pair.mask.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"mask\.png"):
            read_trimap(pair)


def test_a_mask_with_damaged_bytes_is_read_or_rejected_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = trimap_pair(tmp_path, rng.integers(1, 4, (16, 16)).astype(np.uint8))
    whole = pair.mask.read_bytes()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(len(whole)):
            pair.mask.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
            try:
                read_trimap(pair)
            except DataError as error:
                refused += 1
                assert "mask.png" in str(error)  # noqa: PT017 (most positions must raise, a few need not)
    assert refused > len(whole) // 2


@pytest.mark.parametrize("layout", list(Layout))
def test_whatever_pillow_raises_of_a_mask_is_a_data_error(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bomb(path: Path, **options: object) -> Image.Image:
        raise Image.DecompressionBombError("too large")

    pair = trimap_pair(tmp_path, np.ones((2, 2), np.uint8), layout)
    monkeypatch.setattr(Image, "open", bomb)
    with pytest.raises(DataError, match=r"mask\.png: too large \(Pillow's limit"):
        read_trimap(pair)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_mask_that_is_no_regular_file_is_rejected_and_nobody_waits_for_it(
    oxford_copy: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = dataclasses.replace(find(oxford_copy, Split.TEST)[0], layout=layout)
    pair.mask.unlink()
    os.mkfifo(pair.mask)
    # Otherwise opening the pipe would wait for a writer forever.
    keep = os.open(pair.mask, os.O_RDWR | os.O_NONBLOCK)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("it was opened"))
    try:
        with pytest.raises(DataError, match=r"\.png: not a regular file \(a mask"):
            read_trimap(pair)
    finally:
        os.close(keep)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_mask_comes_in_the_formats_of_photos_and_no_other(tmp_path: Path, layout: Layout) -> None:
    """Of the other formats, EPS is the worst: Pillow passes it to Ghostscript, whatever the file is called."""
    pair = trimap_pair(tmp_path, None, layout)
    Image.fromarray(np.ones((8, 8), np.uint8)).save(pair.mask, "EPS")
    with pytest.raises(DataError, match=r"mask\.png: not an image that can be read \(its"):
        read_trimap(pair)


def test_a_mask_with_too_many_pixels_is_rejected_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = trimap_pair(tmp_path, None)
    Image.new("1", (13370, 13350)).save(pair.mask)  # below Pillow's own limit
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"mask\.png: 13370 x 13350 is 178 megapixels; the"):
        read_trimap(pair)


def test_read_pair_names_the_photo_and_the_remedy(oxford_copy: Path) -> None:
    pair = find(oxford_copy, Split.TEST)[0]
    photo, trimap = read_pair(pair)
    assert photo.shape == (64, 64, 3)
    assert trimap.shape == (64, 64)
    pair.image.unlink()
    with pytest.raises(DataError, match=rf"{pair.name}\.jpg.*petseg data check"):
        read_pair(pair)


@pytest.mark.parametrize(("size", "same"), [((64, 64), True), ((33, 33), True), ((128, 128), True), ((64, 62), False)])
def test_a_mask_may_be_smaller_or_larger_than_its_photo_but_not_of_another_shape(
    oxford_copy: Path, size: tuple[int, int], same: bool
) -> None:
    pair = find(oxford_copy, Split.TEST)[0]
    Image.fromarray(read_pair(pair)[1]).resize(size, Image.Resampling.NEAREST).save(pair.mask)
    if same:
        assert read_pair(pair)[1].shape == size[::-1]
    else:
        with pytest.raises(DataError, match=rf"{pair.name}\.png: photo 64 x 64, mask 64 x 62: the aspect"):
            read_pair(pair)


def test_a_mask_of_the_photo_before_its_camera_turned_it_is_rejected(oxford_copy: Path) -> None:
    pair = find(oxford_copy, Split.TEST)[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(pair.image) as photo:
        photo.resize((64, 48)).save(pair.image, exif=turned)
    Image.fromarray(np.ones((48, 64), np.uint8)).save(pair.mask)
    with pytest.raises(DataError, match="photo 48 x 64, mask 64 x 48"):
        read_pair(pair)


def test_a_photo_has_the_same_key_wherever_its_folder_lies_and_another_one_another(
    folder_root: Path, folder_copy: Path
) -> None:
    pairs = find(folder_root, Split.TRAINVAL)
    keys = [photo_key(pair) for pair in pairs]
    assert keys == [photo_key(pair) for pair in find(folder_copy, Split.TRAINVAL)]
    assert len({*keys}) == len(pairs)
    assert {len(key or "") for key in keys} == {KEY_LENGTH}
    same_name = find(folder_copy, Split.TRAINVAL)[0]
    same_name.image.write_bytes(pairs[0].image.read_bytes() + b"\n")
    assert photo_key(same_name) != keys[0]
    same_name.image.unlink()
    assert photo_key(same_name) is None


def test_photos_of_one_name_and_one_file_size_have_keys_of_their_own(tmp_path: Path) -> None:
    """Like the frames of uncompressed videos."""
    keys = set()
    for grey in (40, 90):
        path = tmp_path / f"{grey}" / "frame_0001.bmp"
        path.parent.mkdir()
        Image.new("RGB", (64, 48), (grey, 0, 0)).save(path)
        keys.add((path.stat().st_size, photo_key(Pair("frame_0001", path, path, Layout.FOLDER))))
    assert len({size for size, _ in keys}) == 1
    assert len({key for _, key in keys}) == 2


def test_what_is_no_regular_file_has_no_key_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.bmp")
    for name in ("photo.bmp", "zero\0byte.bmp"):
        assert photo_key(Pair("photo", tmp_path / name, tmp_path / "mask.png", Layout.FOLDER)) is None


def turned_pair(root: Path, photo: int, mask: int, shape: tuple[int, int]) -> tuple[Pair, np.ndarray]:
    """A photo and mask stored alike, each with an EXIF orientation (1: none), and the trimap as stored."""
    pair, truth = find(root, Split.TEST)[0], np.zeros(shape, np.uint8)
    truth[2:20, 4:12] = 255
    for path, turn in ((pair.image, photo), (pair.mask, mask)):
        exif = Image.Exif()
        if turn != 1:
            exif[0x0112] = turn
        Image.fromarray(truth).save(path, exif=exif)
    return pair, truth


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("shape", [(48, 48), (40, 56)])
def test_a_mask_is_turned_as_its_own_exif_says(folder_copy: Path, turn: int, shape: tuple[int, int]) -> None:
    pair, _ = turned_pair(folder_copy, turn, turn, shape)
    photo, trimap = read_pair(pair)
    assert np.array_equal(photo[..., 0] > 127, trimap == PET)
    assert not check([pair]).orientation_unsure


@pytest.mark.parametrize(
    ("photo", "shape", "unsure"),
    [(1, (48, 48), False), (3, (40, 56), True), (2, (40, 56), True), (6, (48, 48), True)],
)
def test_a_mask_that_may_lie_another_way_than_its_photo_is_named(
    folder_copy: Path, photo: int, shape: tuple[int, int], unsure: bool
) -> None:
    pair, truth = turned_pair(folder_copy, photo, 1, shape)
    report = check([pair])
    said = f"{pair.name}: the photo's EXIF orientation is {photo}, {pair.mask.name} has none"
    assert [line.startswith(said) for line in report.orientation_unsure] == [True] * unsure
    assert report.usable
    assert np.array_equal(read_pair(pair)[1] == PET, truth > 0), "a mask without a tag lies as it is"


@pytest.mark.parametrize("photo", [1, 6])
def test_a_mask_is_opened_once_more_only_where_its_photo_was_turned(
    folder_copy: Path, monkeypatch: pytest.MonkeyPatch, photo: int
) -> None:
    """Asking for a PNG's orientation decodes it."""
    pair, _ = turned_pair(folder_copy, photo, 1, (48, 48))
    opened, asked = images.opened, []

    def watched(path: Path) -> Any:
        asked.append(path)
        return opened(path)

    monkeypatch.setattr(images, "opened", watched)
    assert len(check([pair]).orientation_unsure) == (photo != 1)
    assert asked == [pair.mask] * (1 if photo == 1 else 2)


def test_a_mask_that_is_gone_before_its_orientation_is_asked_for_ends_no_check(
    folder_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _ = turned_pair(folder_copy, 6, 1, (48, 48))

    def read_and_gone(pair: Pair, take: Callable[[int], None]) -> np.ndarray:
        trimap = read_trimap(pair, take)
        pair.mask.unlink()
        return trimap

    monkeypatch.setattr(data_module, "read_trimap", read_and_gone)
    report = check([pair])
    assert [str(pair.mask) in line for line in report.unreadable] == [True]


def test_an_upright_mask_of_a_photo_that_its_camera_turned_is_right(folder_copy: Path) -> None:
    pair, truth = turned_pair(folder_copy, 6, 1, (40, 56))
    Image.fromarray(np.rot90(truth, -1)).save(pair.mask)
    photo, trimap = read_pair(pair)
    assert np.array_equal(photo[..., 0] > 127, trimap == PET)
    report = check([pair])
    assert (report.orientation_unsure, report.usable) == ([], True)


def test_photos_are_decoded_at_the_same_time_and_come_in_order(
    oxford_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, together, open_photo = find(oxford_root, Split.TRAINVAL), threading.Barrier(3), images.open_photo
    started: list[Path] = []

    def slow(path: Path, **options: Any) -> Any:
        started.append(path)
        together.wait(10)  # none is done before three have begun
        return open_photo(path, **options)

    monkeypatch.setattr(data_module, "usable_cpus", lambda: 3)
    monkeypatch.setattr(images, "open_photo", slow)
    found = usable(pairs)
    first = next(found)
    time.sleep(0.3)  # time for readers to continue, which they must not
    assert len(started) <= 7, "all at their full size would fill the memory"
    rest = list(found)
    assert len(started) == len(pairs)
    monkeypatch.undo()
    assert names([pair for pair, *_ in (first, *rest)]) == names(pairs)
    for pair, photo, trimap in rest[::5]:
        assert np.array_equal(photo, images.read(pair.image).pixels)
        assert np.array_equal(trimap, read_trimap(pair))


@pytest.mark.parametrize(
    ("photos_of_room", "processes", "promised", "most"),
    [(6, 1, 0, 8), (6, 2, 0, 5), (0, 1, 0, 2), (6, 1, 6, 5), (6, 1, 12, 2), (6, 2, 6, 2), (6, 1, 99, 2)],
)
def test_photos_wait_for_memory_and_none_for_ever(
    oxford_root: Path, monkeypatch: pytest.MonkeyPatch, photos_of_room: int, processes: int, promised: int, most: int
) -> None:
    pairs, read, begun = find(oxford_root, Split.TRAINVAL), data_module._read_photo, []

    def counted(pair: data_module.Pair, take: Callable[[int], None]) -> np.ndarray:
        def take_and_begin(wanted: int) -> None:
            take(wanted)
            begun.append(pair)

        return read(pair, take_and_begin)

    monkeypatch.setattr(data_module, "available_memory", lambda: 2 * 64 * 64 * 16 * photos_of_room)
    monkeypatch.setattr(data_module, "usable_cpus", lambda: 6)
    monkeypatch.setattr(data_module, "_read_photo", counted)
    found = usable(pairs, processes=processes, promised=64 * 64 * 16 * promised)
    first = next(found)
    time.sleep(0.2)  # time for readers to continue, which they must not
    # The requested one gets its memory, and so does one that is alone; the others fit, or wait.
    assert len(begun) <= most, "without a limit 13 would be ahead"
    assert names([pair for pair, *_ in (first, *found)]) == names(pairs)


def test_a_caller_that_stops_leaves_no_reader_waiting(oxford_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "available_memory", lambda: 0)
    monkeypatch.setattr(data_module, "usable_cpus", lambda: 6)
    before = {*threading.enumerate()}
    found = usable(find(oxford_root, Split.TRAINVAL))
    next(found)
    found.close()  # type: ignore[attr-defined] # it is a generator
    assert {*threading.enumerate()} <= before


def test_unusable_pairs_are_reported_in_order_in_the_calling_thread(oxford_copy: Path) -> None:
    pairs = find(oxford_copy, Split.TRAINVAL)
    for number in (3, 4, 20):
        pairs[number].image.write_bytes(b"no photo")
    told: list[tuple[str, threading.Thread]] = []
    found = usable(pairs, lambda pair, error: told.append((pair.name, threading.current_thread())))
    assert names([pair for pair, *_ in found]) == [p.name for i, p in enumerate(pairs) if i not in (3, 4, 20)]
    assert told == [(pairs[number].name, threading.current_thread()) for number in (3, 4, 20)]


# checking


@pytest.mark.parametrize("layout", ["oxford", "folder"])
def test_check_of_a_good_data_set(layout: str, request: pytest.FixtureRequest) -> None:
    pairs = find(request.getfixturevalue(f"{layout}_root"), Split.TRAINVAL)
    report = check(pairs)
    assert report.usable
    assert report.pairs == len(pairs)
    assert [report.missing, report.unreadable, report.wrong_size, report.empty] == [[]] * 4


def test_check_names_and_counts_every_kind_of_fault(oxford_copy: Path) -> None:
    photos, trimaps = oxford_copy / "images", oxford_copy / "annotations" / "trimaps"
    (photos / "pet_00.jpg").unlink()
    (photos / "pet_01.jpg").unlink()
    (trimaps / "pet_01.png").unlink()
    (photos / "pet_02.jpg").write_bytes((photos / "pet_02.jpg").read_bytes()[:200])
    (trimaps / "pet_03.png").write_bytes(b"no")
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(trimaps / "pet_04.png")
    Image.fromarray(np.ones((32, 64), np.uint8)).save(trimaps / "pet_05.png")
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(trimaps / "pet_06.png")
    done: list[int] = []
    report = check(find(oxford_copy, Split.TRAINVAL), done.append)
    assert report.pairs == 24
    assert [Path(p).name for p in report.missing] == ["pet_00.jpg", "pet_01.jpg", "pet_01.png"]
    assert len(report.unreadable) == 3
    for name, line in zip(("pet_02.jpg", "pet_03.png", "pet_04.png"), report.unreadable, strict=True):
        assert name in line
    assert len(report.wrong_size) == 1
    assert report.wrong_size[0].startswith("pet_05")
    assert "photo 64 x 64, mask 64 x 32" in report.wrong_size[0]
    assert report.empty == ["pet_06"]
    assert not report.usable
    assert done == list(range(1, 25))


@pytest.mark.parametrize("fault", ["missing", "unreadable", "wrong_size", "empty"])
def test_only_an_empty_mask_leaves_a_data_set_usable(oxford_copy: Path, fault: str) -> None:
    mask = oxford_copy / "annotations" / "trimaps" / "pet_07.png"
    if fault == "missing":
        mask.unlink()
    elif fault == "unreadable":
        mask.write_bytes(b"x")
    elif fault == "wrong_size":
        Image.fromarray(np.ones((64, 32), np.uint8)).save(mask)
    else:
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(mask)
    report = check(find(oxford_copy, Split.TRAINVAL))
    assert len(getattr(report, fault)) == 1
    assert report.usable is (fault == "empty")


def test_check_opens_photos_at_the_same_time(oxford_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, open_photo = threading.Barrier(3), images.open_photo

    def slow(path: Path, **options: Any) -> Any:
        together.wait(10)  # none is opened before three have begun
        return open_photo(path, **options)

    monkeypatch.setattr(data_module, "usable_cpus", lambda: 3)
    monkeypatch.setattr(images, "open_photo", slow)
    assert check(find(oxford_root, Split.TRAINVAL)).usable


def test_check_of_nothing_is_not_usable() -> None:
    assert not check([]).usable


def test_check_names_a_photo_whose_name_no_file_can_have(oxford_copy: Path) -> None:
    with (oxford_copy / "annotations" / "trainval.txt").open("a") as listing:
        listing.write("x" * 300 + "\n")
    report = check(find(oxford_copy, Split.TRAINVAL))
    assert [f"{'x' * 300}.jpg" in line for line in report.unreadable] == [True]
    assert report.pairs == 25


def test_check_names_the_mask_that_a_folder_lacks(folder_copy: Path) -> None:
    (folder_copy / "masks" / "own_04.png").unlink()
    report = check(find(folder_copy, Split.TRAINVAL))
    assert [Path(p).name for p in report.missing] == ["own_04.png"]
