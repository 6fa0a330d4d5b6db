"""Parsing of option values."""

from __future__ import annotations

import click
import pytest

from petseg_runtime.cli.text import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("192", (192, 192)), ("192x256", (192, 256)), ("64X32", (64, 32)), ("0", (0, 0))]
)
def test_a_size_is_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "32x", "x32", "32x32x3", "-32", "3.5", "32 px", "3²", "9" * 5000])
def test_an_invalid_size_is_rejected(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(text)
