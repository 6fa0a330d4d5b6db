"""Named training settings: the TOML files in this folder, for ``petseg train --recipe NAME``."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from petseg_runtime.errors import UsageError

__all__ = ["describe", "load", "names"]


def names() -> list[str]:
    """Returns the names of the recipes, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml"))


def load(name: str) -> dict[str, Any]:
    """Load the settings of a recipe, for :func:`petseg.config.from_dict`.

    Raises:
        UsageError: There is no recipe of that name; the message lists the recipes.
    """
    return tomllib.loads(_text(name))


def describe(name: str) -> str:
    """Returns the first line of a recipe's comment.

    Raises:
        UsageError: There is no recipe of that name.
    """
    return _text(name).partition("\n")[0].removeprefix("# ")


def _text(name: str) -> str:
    if name not in (known := names()):
        raise UsageError(f"--recipe {name!r}: there is no such recipe; the recipes are: {', '.join(known)}")
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
