"""Which command installs the packages of an extra; error messages about missing packages show it.

petseg is on no package index, so ``pip install 'petseg[...]'`` would not install this project. The commands therefore
name the packages of the extra themselves.
"""

from __future__ import annotations

import importlib.metadata
import shlex

from petseg_runtime import host

__all__ = ["install", "requirements"]


def requirements(extra: str) -> list[str]:
    """Returns the requirements of an extra of petseg, in pip's syntax (``onnxruntime>=1.20``).

    Args:
        extra: Its name in ``pyproject.toml``.

    Returns:
        The requirements from the metadata of the installed package; empty if petseg is not installed, or if the
        installed version does not have that extra.
    """
    try:
        lines = importlib.metadata.requires("petseg") or []
    except importlib.metadata.PackageNotFoundError:  # petseg runs from its source
        return []
    parted = (line.partition(";") for line in lines)
    return [needed.strip() for needed, _, marker in parted if marker.replace('"', "'").strip() == f"extra == '{extra}'"]


def install(extra: str) -> str:
    """Returns the shell command that installs the packages of an extra; on a Jetson, what to do for one of a GPU.

    Args:
        extra: Its name in ``pyproject.toml``.
    """
    if extra in ("gpu", "trt", "rtx") and host.jetson():
        return host.JETSON_TENSORRT
    if needed := requirements(extra):
        return f"pip install {shlex.join(needed)}"
    return f"pip install '.[{extra}]' in a checkout of petseg"
