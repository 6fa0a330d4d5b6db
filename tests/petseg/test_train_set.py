from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from petseg import train_set as train_set_module
from petseg.config import AugmentConfig
from petseg.data import Split, find, read_pair, usable
from petseg.metrics import BACKGROUND, BORDER, PET
from petseg.train_set import UNKNOWN, EpochSampler, TrainSet, decoded_size, target_of
from petseg_runtime import images
from petseg_runtime.errors import DataError, OutputError

STILL = AugmentConfig(flip=0, rotate=0, brightness=0, contrast=0, saturation=0)
GEOMETRIC = AugmentConfig(
    flip=0.5, rotate=25, translate=0.1, scale_min=0.8, scale_max=1.25, brightness=0, contrast=0, saturation=0
)
LIVELY = AugmentConfig(flip=0.5, rotate=15, translate=0.1, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


def train_set(root: Path, augment: AugmentConfig = LIVELY, seed: int = 0, size: int = 32) -> TrainSet:
    return TrainSet(find(root, Split.TRAIN, val_fraction=0.1), size, size, augment, seed)


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_without_augmentation_items_are_the_photos_through_the_one_resize(oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)
    data = TrainSet(pairs, 32, 48, STILL, 0)
    assert data.names == [pair.name for pair in pairs]
    for draw in (0, 5, len(data) + 5):
        photo, trimap, index = data[draw]
        truth, mask = read_pair(pairs[index])
        assert index == draw % len(data)
        assert photo.dtype == trimap.dtype == torch.uint8
        assert np.array_equal(photo.numpy(), images.to_model(truth, 32, 48))
        assert trimap.shape == (32, 48)
        assert set(trimap.unique().tolist()) == {1, 2, 3}
        # nearest neighbour, from 64 x 64: every value is that of a neighbouring pixel of the mask
        nearest = np.array(Image.fromarray(mask).resize((48, 32), Image.Resampling.NEAREST))
        assert np.array_equal(trimap.numpy(), nearest)


def test_an_item_depends_on_its_number_and_the_seed_alone(oxford_root: Path) -> None:
    one, two = train_set(oxford_root), train_set(oxford_root)
    n = len(one)
    draws = [0, 1, n - 1, n, 3 * n + 4]
    forward = {d: one[d] for d in draws}
    torch.manual_seed(12345)
    torch.rand(10)
    backward = {d: two[d] for d in reversed(draws)}
    assert all(same(forward[d], backward[d]) for d in draws)
    other = train_set(oxford_root, seed=1)
    assert not any(same(forward[d], other[d]) for d in draws)
    assert not same(one[0], one[n]), "every epoch must change a photo anew"


def test_drawing_leaves_the_generator_and_the_photos_as_they_were(oxford_root: Path) -> None:
    data, still = train_set(oxford_root), train_set(oxford_root, STILL)
    before = torch.random.get_rng_state()
    for draw in range(2 * len(data)):
        data[draw]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(train_set(oxford_root)[3], data[3])
    assert same(still[3], train_set(oxford_root, STILL)[3])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(oxford_root: Path) -> None:
    data = train_set(oxford_root)

    def batches(workers: int) -> list[list[torch.Tensor]]:
        """Draws of one epoch and of the end of the next, by the same workers."""
        sampler = EpochSampler(len(data), 4, seed=0)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        found = []
        for sampler.epoch, sampler.start in ((1, 0), (2, 3)):
            found += list(loader)
        return found

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) == 5 + 2
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def inner(mask: np.ndarray) -> np.ndarray:
    """Pixels whose 5 x 5 neighbourhood has one class only, so that interpolation does not change them."""
    size = 2
    padded = np.pad(mask, size, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * size + 1, 2 * size + 1))
    flat = windows.min(axis=(2, 3)) == windows.max(axis=(2, 3))
    flat[:size], flat[-size:], flat[:, :size], flat[:, -size:] = False, False, False, False
    return flat


def test_photo_and_mask_are_transformed_together(folder_copy: Path) -> None:
    """The photos show their masks: after any transform, pixels must be bright where the mask is pet."""
    for path in (folder_copy / "masks").iterdir():
        mask = np.zeros((64, 64), np.uint8)
        mask[10:40, 30:58] = 255  # an asymmetric L: no flip or rotation maps it onto itself
        mask[30:40, 14:30] = 255
        Image.fromarray(mask).save(path)
        Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(folder_copy / "images" / path.name)
    moved = TrainSet(find(folder_copy, Split.TRAIN), 64, 64, GEOMETRIC, 0)
    unmoved = TrainSet(find(folder_copy, Split.TRAIN), 64, 64, STILL, 0)[0][1]
    changed = 0
    for draw in range(5 * len(moved)):
        photo, trimap, _ = moved[draw]
        shown, told = photo.numpy(), trimap.numpy()
        sure = inner(told)
        assert sure.sum() > 1000
        assert np.array_equal(shown[sure][:, 0] > 127, told[sure] == PET), f"draw {draw}"
        assert np.ptp(shown, axis=2).max() == 0
        changed += (trimap != unmoved).float().mean().item() > 0.05
    assert changed > 4 * len(moved), "the augmentation hardly moves anything"


def test_a_teachers_map_is_transformed_with_the_photo_but_not_colour_jittered(oxford_root: Path) -> None:
    """A teacher that returns the photo's red: after any transform it must equal the red of the transformed photo."""
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)
    asked: list[np.ndarray] = []

    def teacher(photo: np.ndarray) -> np.ndarray:
        asked.append(photo)
        return images.to_model(photo, 32, 32)[..., 0]

    data = TrainSet(pairs, 32, 32, GEOMETRIC, 0, teacher)
    assert len(asked) == len(pairs) > 10, "once for each photo"
    assert all(np.array_equal(photo, read_pair(pair)[0]) for photo, pair in zip(asked, pairs, strict=True))
    plain = train_set(oxford_root, GEOMETRIC)
    coloured = TrainSet(pairs, 32, 32, dataclasses.replace(GEOMETRIC, brightness=0.3, hue=0.1), 0, teacher)
    for draw in range(3 * len(data)):
        photo, labels, index = data[draw]
        assert same((photo, labels[0], index), plain[draw])
        assert torch.equal(labels[1], photo[..., 0])
        assert torch.equal(coloured[draw][1], labels)
        assert not torch.equal(coloured[draw][0], photo)


def test_a_teachers_map_is_interpolated_and_zero_outside_of_the_photo(oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    turned = AugmentConfig(flip=0, rotate=30, brightness=0, contrast=0, saturation=0)
    data = TrainSet(pairs, 32, 32, turned, 0, lambda photo: ramp)
    values = {v for draw in range(len(data)) for v in data[draw][1][1].unique().tolist()}
    assert len(values) > 100, "the nearest pixel has 32 values"
    shrunk = AugmentConfig(flip=0, rotate=0, scale_min=0.5, scale_max=0.5, brightness=0, contrast=0, saturation=0)
    data = TrainSet(pairs, 32, 32, shrunk, 0, lambda photo: np.full((32, 32), 200, np.uint8))
    for draw in range(3):
        trimap, said = data[draw][1]
        for corner in (np.s_[:4, :4], np.s_[-4:, -4:]):
            assert (trimap[corner] == BACKGROUND).all()
            assert not said[corner].any()
        assert (said[12:20, 12:20] == 200).all()


def test_a_pasted_pet_comes_with_its_mask_and_its_teacher(folder_copy: Path) -> None:
    """Photos of one grey each, and a teacher that returns that grey: photo, mask and teacher must agree everywhere."""
    folder = folder_copy / "masks"
    for number, path in enumerate(sorted(folder.iterdir())):
        mask = np.zeros((64, 64), np.uint8)
        mask[10:40, 30:58] = 255
        Image.fromarray(mask).save(path)
        grey = np.where(mask, 100, 10).astype(np.uint8) + np.uint8(number)
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(folder_copy / "images" / path.name)
    pairs = find(folder_copy, Split.TRAIN)
    config = AugmentConfig(flip=0, rotate=0, translate=0.3, brightness=0, contrast=0, saturation=0, paste=0.5)
    data = TrainSet(pairs, 64, 64, config, 0, lambda photo: photo[..., 0])
    pasted = 0
    for draw in range(20 * len(data)):
        photo, labels, index = data[draw]
        shown, moved = photo[..., 0], photo.amax(2) > 0  # black: uncovered by the shift
        assert torch.equal(labels[1][moved], shown[moved])
        assert torch.equal(labels[0] == PET, shown >= 100)
        own = int(read_pair(pairs[index])[0][0, 0, 0]) - 10
        background = shown[moved & (shown < 100)]
        assert set(background.tolist()) <= {10 + own}, "the photo behind is the one that was drawn"
        pasted += bool(set(shown[shown >= 100].tolist()) - {100 + own})
    # Half of the draws paste a pet, occasionally the photo's own.
    assert 0.3 < pasted / (20 * len(data)) < 0.6


def test_the_border_is_pasted_with_the_pet(oxford_root: Path) -> None:
    data = train_set(oxford_root, dataclasses.replace(STILL, paste=1.0))
    still = train_set(oxford_root, STILL)
    plain = [still[index][:2] for index in range(len(still))]
    others = 0
    for draw in range(len(data)):
        photo, trimap, index = data[draw]
        behind, its_trimap = plain[index]
        fits = []  # whose pet it is
        for other, (pet, its_own) in enumerate(plain):
            fur = its_own != BACKGROUND
            pasted = torch.where(fur[..., None], pet, behind), torch.where(fur, its_own, its_trimap)
            if torch.equal(photo, pasted[0]) and torch.equal(trimap, pasted[1]):
                fits.append(other)
        assert len(fits) == 1
        others += fits != [index]
    assert others > 0.75 * len(data), "now and then a photo's own pet"


def test_half_of_the_photos_are_mixed_with_another_which_is_the_weaker_one(folder_copy: Path) -> None:
    """Photos of one grey each, ten apart: a draw is mixed if its grey is not its own, but towards another's."""
    paths = sorted((folder_copy / "images").iterdir())
    greys = {path.stem: 10 * number for number, path in enumerate(paths, 2)}
    for path in paths:
        Image.new("RGB", (64, 64), (greys[path.stem],) * 3).save(path)
    data = TrainSet(find(folder_copy, Split.TRAIN), 64, 64, dataclasses.replace(STILL, mix=0.5), 0)
    own = [greys[name] for name in data.names]
    mixed, apart = 0, []
    for draw in range(40 * len(data)):
        photo, trimap, index = data[draw]
        shown = photo.unique().tolist()
        assert len(shown) == 1
        if (trimap == UNKNOWN).all():
            mixed += 1
            apart.append(abs(shown[0] - own[index]))
        else:
            assert shown == [own[index]]
            assert set(trimap.unique().tolist()) <= {PET, BACKGROUND, BORDER}
    assert 0.4 < mixed / (40 * len(data)) < 0.6
    furthest = (max(own) - min(own)) / 2
    assert 0.5 * furthest < max(apart) <= furthest + 0.5, "never more than half is the other's"
    assert len(set(apart)) > 5, "the weight is drawn"


def test_the_mixed_photo_is_augmented_separately(oxford_root: Path) -> None:
    """A single photo: mixed with itself, it still is a different picture."""
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)[:1]
    plain = TrainSet(pairs, 32, 32, GEOMETRIC, 0)
    mixed = TrainSet(pairs, 32, 32, dataclasses.replace(GEOMETRIC, mix=1.0), 0)
    assert not any(torch.equal(plain[draw][0], mixed[draw][0]) for draw in range(10))
    assert same(mixed[3], mixed[3])
    # With certain flips both are flipped: an unflipped one would show through.
    flipped = dataclasses.replace(STILL, flip=1.0)
    still, twice = (
        TrainSet(pairs, 32, 32, flipped, 0),
        TrainSet(pairs, 32, 32, dataclasses.replace(flipped, mix=1.0), 0),
    )
    assert all(torch.equal(still[draw][0], twice[draw][0]) for draw in range(10))


def test_the_last_epochs_see_unmixed_photos(oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)
    mixed = TrainSet(pairs, 32, 32, dataclasses.replace(STILL, mix=1.0), 0, mix_epochs=1.5)
    plain = TrainSet(pairs, 32, 32, STILL, 0)
    for draw in range(4 * len(pairs)):
        unknown = bool((mixed[draw][1] == UNKNOWN).all())
        assert unknown == (draw < 2 * len(pairs))
        assert unknown or same(mixed[draw], plain[draw])


def test_a_teacher_that_is_run_once_per_photo_cannot_be_combined_with_mixing(oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.TRAIN, val_fraction=0.1)
    with pytest.raises(ValueError, match=r"augment\.mix"):
        TrainSet(pairs, 32, 32, dataclasses.replace(STILL, mix=0.5), 0, lambda photo: photo[..., 0])


def test_flips_have_the_given_probability(folder_root: Path) -> None:
    still, flips = train_set(folder_root, STILL), []
    for probability in (0.0, 0.5, 1.0):
        data = train_set(folder_root, AugmentConfig(flip=probability, rotate=0, brightness=0, contrast=0, saturation=0))
        n = len(data)
        flipped = 0
        for draw in range(12 * n):
            expected = still[draw % n]
            photo, trimap, _ = data[draw]
            mirrored = torch.equal(trimap, expected[1].flip(1)) and torch.equal(photo, expected[0].flip(1))
            assert mirrored or (torch.equal(trimap, expected[1]) and torch.equal(photo, expected[0]))
            flipped += mirrored
        flips.append(flipped / (12 * n))
    assert flips[0] == 0
    assert 0.3 < flips[1] < 0.7
    assert flips[2] == 1


@pytest.mark.parametrize(
    ("settings", "lowest", "highest"),
    [
        ({"translate": 0.1}, -6, 6),  # pixels of 64
        ({"rotate": 30.0}, -30, 30),  # degrees
        ({"scale_min": 0.5, "scale_max": 1.5}, 0.5, 1.5),
    ],
    ids=str,
)
def test_each_movement_covers_its_range_in_all_directions(
    folder_copy: Path, settings: dict[str, float], lowest: float, highest: float
) -> None:
    """A square, on the right of the centre: its shift, its angle around the centre, or its size."""
    pair, mask = find(folder_copy, Split.TRAIN)[0], np.zeros((64, 64), np.uint8)
    mask[26:38, 38:50] = 255
    Image.fromarray(mask).save(pair.mask)
    data = TrainSet([pair], 64, 64, dataclasses.replace(STILL, **settings), 0)
    found: list[tuple[float, ...]] = []
    for draw in range(60):
        y, x = np.nonzero(data[draw][1].numpy() == PET)
        down, right = y.mean() - 31.5, x.mean() - 31.5
        if "translate" in settings:
            found.append((down, right - 12))
        elif "rotate" in settings:
            found.append((math.degrees(math.atan2(down, right)),))
        else:
            found.append((math.sqrt(len(y)) / 12,))
    margin = (highest - lowest) / 5
    for values in zip(*found, strict=True):
        assert lowest - margin / 10 <= min(values) < lowest + margin
        assert highest - margin < max(values) <= highest + margin / 10


GREY = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize(
    ("setting", "towards"),
    [
        ("brightness", np.zeros_like),
        ("contrast", lambda photo: np.full_like(photo, (photo @ GREY).mean())),
        ("saturation", lambda photo: np.repeat((photo @ GREY)[..., None], 3, axis=2)),
    ],
)
def test_each_colour_setting_changes_that_alone(folder_copy: Path, setting: str, towards: Any) -> None:
    """It moves all values by one factor away from, or towards: black; the mean grey; each pixel's own grey."""
    pair, photo = find(folder_copy, Split.TRAIN)[0], np.full((64, 64, 3), 60, np.uint8)
    photo[:, :32] = (140, 110, 60)
    Image.fromarray(photo).save(pair.image)
    data = TrainSet([pair], 64, 64, dataclasses.replace(STILL, **{setting: 0.4}), 0)
    own = photo.astype(float)
    away, factors = own - towards(own), []
    for draw in range(40):
        moved = data[draw][0].numpy() - (own - away)
        far = np.abs(away) > 30
        factors.append(np.median(moved[far] / away[far]))
        assert np.abs(moved - factors[-1] * away).max() < 2.5
    assert 0.58 < min(factors) < 0.75
    assert 1.25 < max(factors) < 1.42


def test_hue_changes_colours_and_no_grey(folder_copy: Path) -> None:
    pair, photo = find(folder_copy, Split.TRAIN)[0], np.full((64, 64, 3), 60, np.uint8)
    photo[:, :32] = (140, 110, 60)
    Image.fromarray(photo).save(pair.image)
    data = TrainSet([pair], 64, 64, dataclasses.replace(STILL, hue=0.2), 0)
    for draw in range(10):
        shown = data[draw][0].numpy().astype(int)
        assert (shown[:, 32:] == 60).all()
        assert abs(shown[0, 0].max() - 140) <= 2
        assert abs(shown[0, 0].min() - 60) <= 2
    assert len({tuple(data[draw][0][0, 0].tolist()) for draw in range(10)}) > 5


def test_a_mask_is_never_interpolated_or_colour_jittered(oxford_root: Path) -> None:
    moved = train_set(oxford_root, GEOMETRIC)
    assert {v for draw in range(len(moved)) for v in moved[draw][1].unique().tolist()} == {1, 2, 3}
    coloured = train_set(oxford_root, AugmentConfig(flip=0, rotate=0, hue=0.1))
    still = train_set(oxford_root, STILL)
    for draw in range(len(still)):
        assert torch.equal(coloured[draw][1], still[draw][1])
        assert not torch.equal(coloured[draw][0], still[draw][0])


def test_pixels_uncovered_by_shrinking_are_black_and_background(oxford_root: Path) -> None:
    data = train_set(oxford_root, AugmentConfig(rotate=0, scale_min=0.5, scale_max=0.5, brightness=0, contrast=0))
    photo, trimap, _ = data[0]
    for corner in (np.s_[:4, :4], np.s_[-4:, -4:]):
        assert not photo[corner].any()
        assert (trimap[corner] == BACKGROUND).all()


def test_photos_with_an_empty_mask_are_excluded_by_name(oxford_copy: Path) -> None:
    for name, value in (("pet_03", 2), ("pet_11", 3)):
        Image.fromarray(np.full((64, 64), value, np.uint8)).save(oxford_copy / "annotations/trimaps" / f"{name}.png")
    data = TrainSet(find(oxford_copy, Split.TRAINVAL), 32, 32, STILL, 0)
    assert data.skipped_empty == ["pet_03", "pet_11"]
    assert len(data) == len(data.names) == 22
    assert "pet_03" not in data.names
    photo, _, index = data[3]
    assert data.names[index] == "pet_04"
    truth = images.read(oxford_copy / "images" / "pet_04.jpg").pixels
    assert np.array_equal(photo.numpy(), images.to_model(truth, 32, 32))


def test_nothing_but_empty_masks_is_rejected(oxford_copy: Path) -> None:
    for path in (oxford_copy / "annotations" / "trimaps").iterdir():
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(path)
    with pytest.raises(DataError, match="no photo with a pet"):
        train_set(oxford_copy)


def test_an_unreadable_photo_stops_the_reading_by_name(oxford_copy: Path) -> None:
    (oxford_copy / "images" / "pet_05.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"pet_05\.jpg"):
        TrainSet(find(oxford_copy, Split.TRAINVAL), 32, 32, STILL, 0)


def test_a_mask_of_another_size_than_its_photo_is_rejected_by_name(oxford_copy: Path) -> None:
    """`CheckReport.usable` says that training would not start with it."""
    Image.fromarray(np.ones((32, 64), np.uint8)).save(oxford_copy / "annotations" / "trimaps" / "pet_05.png")
    with pytest.raises(DataError, match="pet_05"):
        TrainSet(find(oxford_copy, Split.TRAINVAL), 32, 32, STILL, 0)


def teach_black(photo: np.ndarray) -> np.ndarray:
    return np.full((32, 32), photo[0, 0, 0], np.uint8)


@pytest.mark.parametrize("teacher", [None, teach_black])
def test_photos_in_a_file_are_those_in_memory(oxford_copy: Path, tmp_path: Path, teacher: Any) -> None:
    pairs, folder = find(oxford_copy, Split.TRAIN, val_fraction=0.1), tmp_path / "new" / "run"
    Image.new("L", (64, 64), 2).save(pairs[4].mask)
    kept, mapped = (TrainSet(pairs, 32, 32, LIVELY, 0, teacher, None, place) for place in (None, folder))
    assert kept.names == mapped.names
    assert len(mapped) == len(pairs) - 1
    assert all(same(kept[draw], mapped[draw]) for draw in range(2 * len(kept)))
    assert isinstance(mapped._photos.base, np.memmap)
    assert isinstance(mapped._trimaps.base, np.memmap)
    assert list(folder.iterdir()) == [], "a killed process would leave it there"
    size = kept._photos.nbytes + kept._trimaps.nbytes
    assert decoded_size(len(pairs), 32, 32, teacher is not None) == size


def test_a_disk_without_room_for_the_photos_is_an_output_error(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=rf"{tmp_path}: no room for 0\.0 GB .*No space left on device.*--size"):
        TrainSet(find(oxford_root, Split.TRAIN), 32, 32, STILL, 0, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("teacher", [None, teach_black])
def test_readers_leave_the_memory_that_the_decoded_photos_will_take(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Any
) -> None:
    """The system still counts memory as free that was allocated but not touched."""
    pairs, told = find(oxford_root, Split.TRAIN, val_fraction=0.1), []

    def spied(*words: Any) -> Any:
        told.append(words[2:])
        return usable(*words)

    monkeypatch.setattr(train_set_module, "usable", spied)
    for folder in (None, tmp_path):
        TrainSet(pairs, 32, 32, STILL, 0, teacher, None, folder, processes=2)
    assert told == [(2, decoded_size(len(pairs), 32, 32, teacher is not None)), (2, 0)]


# targets and batches


@pytest.mark.parametrize("border", [0.0, 0.5, 1.0])
def test_the_target_of_each_class(border: float) -> None:
    target = target_of(torch.tensor([[[PET, BACKGROUND, BORDER]]], dtype=torch.uint8), border)
    assert target.shape == (1, 1, 1, 3)
    assert target.dtype == torch.float32
    assert target.flatten().tolist() == [1.0, 0.0, border]


def test_an_epoch_covers_the_photos_without_repetition() -> None:
    sampler = EpochSampler(22, 4, seed=0)
    assert len(sampler) == 5
    batches = list(sampler)
    assert [len(b) for b in batches] == [4] * 5
    drawn = [draw for b in batches for draw in b]
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(range(22))
    assert sorted(d for b in EpochSampler(20, 4, seed=3) for d in b) == list(range(20))


def test_every_epoch_has_its_own_order_and_numbers() -> None:
    sampler = EpochSampler(20, 4, seed=0)
    orders = []
    for epoch in range(4):
        sampler.epoch = epoch
        drawn = [draw for b in sampler for draw in b]
        assert sorted(drawn) == list(range(20 * epoch, 20 * epoch + 20))
        orders.append(tuple(d % 20 for d in drawn))
    assert len(set(orders)) == 4
    assert tuple(d for b in EpochSampler(20, 4, seed=1) for d in b) not in orders


def test_over_the_epochs_every_photo_is_drawn() -> None:
    sampler = EpochSampler(22, 4, seed=0)
    seen = set()
    for epoch in range(12):
        sampler.epoch = epoch
        seen |= {d % 22 for b in sampler for d in b}
    assert seen == set(range(22))


@pytest.mark.parametrize("start", range(6))
def test_a_resumed_epoch_continues_where_it_was_stopped(start: int) -> None:
    whole, rest = EpochSampler(22, 4, seed=9), EpochSampler(22, 4, seed=9)
    whole.epoch = rest.epoch = 2
    rest.start = start
    assert list(rest) == list(whole)[start:]


def test_the_order_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = list(EpochSampler(20, 4, seed=0))
    torch.manual_seed(2)
    assert list(EpochSampler(20, 4, seed=0)) == first


def test_fewer_photos_than_a_batch_are_rejected() -> None:
    with pytest.raises(DataError, match=r"3 photos.*batch takes 4.*--batch"):
        EpochSampler(3, 4, seed=0)
    with pytest.raises(DataError, match="1 photo to train on, but a batch takes 2; 2 or more are needed"):
        EpochSampler(1, 2, seed=0)
    assert len(EpochSampler(4, 4, seed=0)) == 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_target_with_a_teacher_lies_between_truth_and_teacher(share: float) -> None:
    labels = torch.tensor([[[[PET, BACKGROUND, BORDER]], [[0, 255, 51]]]], dtype=torch.uint8)
    target = target_of(labels, 0.4, share)
    assert target.shape == (1, 1, 1, 3)
    truth, said = torch.tensor([1.0, 0.0, 0.4]), torch.tensor([0.0, 1.0, 0.2])
    torch.testing.assert_close(target[0, 0, 0], (1 - share) * truth + share * said)
