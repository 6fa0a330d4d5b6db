"""The cameras of this machine, as Linux lists them (V4L2), and why one of them cannot be used."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Camera", "cameras", "why_not"]

_DEVICES: Final = Path("/dev")
_NAMES: Final = Path("/sys/class/video4linux")


@dataclass(frozen=True)
class Camera:
    """One video device; many a camera has a second one, which gives no pictures.

    Attributes:
        device: Its file, which ``petseg infer`` takes.
        name: As its driver calls it; "" if that is not known.
    """

    device: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.device} ({self.name})" if self.name else self.device


def cameras() -> tuple[Camera, ...]:
    """All video devices, by their numbers; none on a system without V4L2."""
    found = [(int(path.name[5:]), path) for path in _DEVICES.glob("video*") if re.fullmatch(r"video\d+", path.name)]
    return tuple(Camera(str(path), _name(path.name)) for _, path in sorted(found))


def _name(device: str) -> str:
    try:
        return (_NAMES / device / "name").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def why_not(device: str) -> str | None:
    """Why a camera cannot be used, with the remedy; None: nothing is known against it.

    Args:
        device: Its file, such as ``/dev/video0``.
    """
    if not Path(device).exists():
        if there := ", ".join(map(str, cameras())):
            return f"there is no such camera; the cameras here: {there}"
        return "there is no such camera; this machine shows none: connect one (a container gets it by --device)"
    if os.access(device, os.R_OK | os.W_OK):
        return None
    group = _group(device)
    return f"no permission to use it: join its group, {group} (sudo usermod -aG {group} $USER), and log in again"


def _group(device: str) -> str:
    """The group that may use a device; ``video`` on nearly every system."""
    try:
        return Path(device).group()
    except (OSError, KeyError):
        return "video"
