"""Smoothing reduces flicker where the picture stands still, not where it moves, and forgets the past at a cut."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from petseg_runtime.errors import UsageError
from petseg_runtime.video.smoothing import Smoother

U8 = npt.NDArray[np.uint8]

SIZE = (40, 48)
strengths = st.floats(0, 0.99)
probabilities = arrays(np.uint8, SIZE)
pictures = arrays(np.uint8, (*SIZE, 3))


def texture(seed: int = 0, low: int = 40, high: int = 200) -> U8:
    """A picture in which any motion is visible."""
    return np.random.default_rng(seed).integers(low, high, (*SIZE, 3), dtype=np.uint8)


def noisy(plane: U8, sigma: float, rng: np.random.Generator) -> U8:
    return np.rint(plane + rng.normal(0, sigma, plane.shape)).clip(0, 255).astype(np.uint8)


def full(value: int) -> U8:
    return np.full(SIZE, value, np.uint8)


def test_the_first_output_is_unchanged() -> None:
    answer = texture()[..., 0]
    np.testing.assert_array_equal(Smoother(0.9)(texture(), answer, 0.0), answer)


@given(st.lists(st.tuples(pictures, probabilities), min_size=1, max_size=4))
def test_strength_0_changes_nothing(frames: list[tuple[U8, U8]]) -> None:
    smoother = Smoother(0)
    for number, (image, answer) in enumerate(frames):
        np.testing.assert_array_equal(smoother(image, answer, number / 30), answer)


@given(strengths, pictures, probabilities, st.floats(1e-4, 0.9))
def test_a_constant_input_is_unchanged(strength: float, image: U8, answer: U8, step: float) -> None:
    smoother = Smoother(strength)
    for number in range(5):
        np.testing.assert_array_equal(smoother(image, answer, number * step), answer)


@given(strengths, st.lists(st.tuples(pictures, probabilities), min_size=1, max_size=5))
def test_outputs_lie_between_the_inputs(strength: float, frames: list[tuple[U8, U8]]) -> None:
    smoother = Smoother(strength)
    for number, (image, answer) in enumerate(frames):
        smoothed = smoother(image, answer, number / 30)
        given_ = np.stack([past for _, past in frames[: number + 1]])
        assert (smoothed >= given_.min(axis=0)).all()
        assert (smoothed <= given_.max(axis=0)).all()


@pytest.mark.parametrize(("strength", "calmer"), [(0.5, 2), (0.85, 6), (0.95, 12)])
def test_noise_is_reduced(strength: float, calmer: float) -> None:
    """White noise changes less from frame to frame by sqrt(1 + s) / (1 - s): 2.4, 9 and 28 times; less rounding."""
    rng, smoother, scene = np.random.default_rng(1), Smoother(strength), texture()
    plain = [noisy(full(128), 20, rng) for _ in range(40)]
    calmed = [smoother(noisy(scene, 2, rng), answer, n / 30) for n, answer in enumerate(plain)]

    def change(answers: list[U8]) -> float:
        return float(np.abs(np.diff(np.stack(answers[10:]).astype(int), axis=0)).mean())

    assert change(plain) > calmer * change(calmed)
    assert abs(float(np.mean(calmed[20:])) - 128) < 0.5


def test_a_small_change_is_reached_exactly() -> None:
    """The past is kept in floats: rounded to bytes, it would never reach the output."""
    smoother = Smoother(0.95)
    smoother(texture(), full(100), 0.0)
    for number in range(1, 300):
        last = smoother(texture(), full(101), number / 30)
    np.testing.assert_array_equal(last, full(101))


def test_only_what_stands_still_keeps_its_past() -> None:
    before, after = texture(), texture()
    after[:12, :16] += 55
    smoother = Smoother(0.9)
    smoother(before, full(0), 0.0)
    smoothed = smoother(after, full(250), 1 / 30)
    np.testing.assert_array_equal(smoothed[:12, :16], 250)
    np.testing.assert_array_equal(smoothed[20:, 24:], 25)


def test_a_change_of_brightness_is_not_motion() -> None:
    smoother, scene = Smoother(0.8), texture()
    smoother(scene, full(0), 0.0)
    brighter = np.rint(scene * 1.08).astype(np.uint8)
    assert smoother(brighter, full(250), 1 / 30).max() <= 60


@pytest.mark.parametrize("frame", [texture(1), np.zeros((*SIZE, 3), np.uint8), np.full((*SIZE, 3), 255, np.uint8)])
def test_nothing_outlives_a_cut(frame: U8) -> None:
    smoother, rng = Smoother(0.99), np.random.default_rng(0)
    for number in range(10):
        smoother(texture(), full(255), number / 30)
    answer = noisy(full(100), 50, rng)
    np.testing.assert_array_equal(smoother(frame, answer, 10 / 30), answer)


def test_places_alike_by_chance_do_not_outlive_a_cut() -> None:
    before, after = texture(), texture(1)
    before[:12] = after[:12] = 128
    smoother = Smoother(0.99)
    smoother(before, full(255), 0.0)
    np.testing.assert_array_equal(smoother(after, full(3), 1 / 30), full(3))


def test_black_frames_are_smoothed() -> None:
    smoother, black = Smoother(0.5), np.zeros((*SIZE, 3), np.uint8)
    smoother(black, full(0), 0.0)
    np.testing.assert_array_equal(smoother(black, full(100), 1 / 30), full(50))


def test_the_past_is_forgotten_after_a_gap() -> None:
    smoother = Smoother(0.99)
    smoother(texture(), full(255), 0.0)
    assert smoother(texture(), full(0), 0.9).min() > 100
    np.testing.assert_array_equal(smoother(texture(), full(0), 2.0), full(0))


def test_another_size_starts_without_a_past() -> None:
    smoother = Smoother(0.99)
    smoother(texture(), full(255), 0.0)
    turned = np.zeros(SIZE[::-1], np.uint8)
    np.testing.assert_array_equal(smoother(texture().transpose(1, 0, 2), turned, 1 / 30), turned)


@pytest.mark.parametrize("rate", [10, 24, 25, 60, 120])
def test_the_past_decays_with_time_at_any_frame_rate(rate: int) -> None:
    strength, smoother = 0.9, Smoother(0.9)
    smoother(texture(), full(255), 0.0)
    for number in range(1, rate // 2 + 1):
        left = smoother(texture(), full(0), number / rate)
    seconds = (rate // 2) / rate
    np.testing.assert_allclose(left, 255 * strength ** (30 * seconds), atol=0.51)


@pytest.mark.parametrize("step", [0.0, 1e-5, -0.1])
def test_masks_do_not_freeze_if_timestamps_are_broken(step: float) -> None:
    smoother = Smoother(0.85)
    smoother(texture(), full(255), 0.0)
    for number in range(1, 200):
        last = smoother(texture(), full(0), number * step)
    np.testing.assert_array_equal(last, full(0))


@given(strengths, pictures, probabilities)
def test_the_caller_owns_the_output(strength: float, image: U8, answer: U8) -> None:
    smoother = Smoother(strength)
    kept_image, kept_answer = image.copy(), answer.copy()
    first = smoother(image, answer, 0.0)
    assert (first.dtype, first.shape) == (np.uint8, SIZE)
    assert first.flags.owndata
    assert first.flags.writeable
    first[:] = 77
    np.testing.assert_array_equal(image, kept_image)
    np.testing.assert_array_equal(answer, kept_answer)
    second = smoother(image, answer, 1 / 30)
    np.testing.assert_array_equal(second, kept_answer)
    image[:], answer[:] = 0, 0  # a buffer that its owner reuses
    np.testing.assert_array_equal(smoother(kept_image, kept_answer, 2 / 30), kept_answer)


def test_read_only_and_strided_input_is_accepted() -> None:
    image, answer = texture()[:, ::-1], texture(2)[..., 1]
    image.flags.writeable = answer.flags.writeable = False
    smoother = Smoother(0.9)
    smoother(image, answer, 0.0)
    np.testing.assert_array_equal(smoother(image, answer, 1 / 30), answer)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    smoother, image = Smoother(0.5), np.full((*size, 3), 9, np.uint8)
    smoother(image, np.zeros(size, np.uint8), 0.0)
    np.testing.assert_array_equal(smoother(image, np.full(size, 100, np.uint8), 1 / 30), np.full(size, 50))


def test_two_streams_share_nothing() -> None:
    one, other = Smoother(0.9), Smoother(0.9)
    one(texture(), full(255), 0.0)
    np.testing.assert_array_equal(other(texture(), full(0), 1 / 30), full(0))
    assert one(texture(), full(0), 1 / 30).min() > 200


@pytest.mark.parametrize("strength", [-0.1, 1.0, 2.0, math.nan, math.inf])
def test_a_strength_out_of_range_is_rejected(strength: float) -> None:
    with pytest.raises(UsageError, match=f"smoothing {strength} must be from 0 to below 1"):
        Smoother(strength)
