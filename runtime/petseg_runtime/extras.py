"""What to install where a package is missing. petseg is on no package index: ``pip install petseg`` would bring nothing
of ours, so what is named are the packages of the extra themselves.
"""

from __future__ import annotations

import importlib.metadata
import shlex

__all__ = ["install", "requirements"]


def requirements(extra: str) -> list[str]:
    """What an extra of petseg brings, as pip takes it (``onnxruntime>=1.20``).

    Args:
        extra: Its name in ``pyproject.toml``.

    Returns:
        As the installed package says; empty if petseg is not installed, or was before there was such an extra.
    """
    try:
        lines = importlib.metadata.requires("petseg") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return []
    parted = (line.partition(";") for line in lines)
    return [needed.strip() for needed, _, marker in parted if marker.replace('"', "'").strip() == f"extra == '{extra}'"]


def install(extra: str) -> str:
    """The command that brings what an extra brings, to be pasted into a shell.

    Args:
        extra: Its name in ``pyproject.toml``.
    """
    if needed := requirements(extra):
        return f"pip install {shlex.join(needed)}"
    return f"pip install '.[{extra}]' in a checkout of petseg"
