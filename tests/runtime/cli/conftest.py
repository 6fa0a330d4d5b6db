"""Photos and models that the tests of several commands need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from command_line import CHELSEA

Toy: TypeAlias = Callable[..., Any]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small photo with a pet, in a separate folder."""
    path = tmp_path / "in" / "cat.jpg"
    path.parent.mkdir()
    path.write_bytes(CHELSEA.read_bytes())
    return path


@pytest.fixture
def reds(toy: Toy, tmp_path: Path) -> list[str]:
    """A command for five small photos and a model for which red is pet; the caller adds the output folder."""
    (tmp_path / "photos").mkdir()
    for index in range(5):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[4 : 10 + index, 5:20, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return ["infer", str(tmp_path / "photos"), "--model", str(toy(tmp_path / "toy.onnx").path), "--output"]
