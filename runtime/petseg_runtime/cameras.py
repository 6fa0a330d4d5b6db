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
    """One video device; many cameras have a second one, which delivers no pictures.

    Attributes:
        device: Its device file, which ``petseg infer`` accepts.
        name: Its name as given by the driver; "" if unknown.
    """

    device: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.device} ({self.name})" if self.name else self.device


def cameras() -> tuple[Camera, ...]:
    """Returns all video devices in the order of their numbers; none on a system without V4L2."""
    found = [(int(path.name[5:]), path) for path in _DEVICES.glob("video*") if re.fullmatch(r"video\d+", path.name)]
    return tuple(Camera(str(path), _name(path.name)) for _, path in sorted(found))


def _name(device: str) -> str:
    try:
        return (_NAMES / device / "name").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def why_not(device: str) -> str | None:
    """Returns why a camera cannot be used, with the remedy; None if no reason is known.

    Args:
        device: Its device file, such as ``/dev/video0``.
    """
    if not Path(device).exists():
        if there := ", ".join(map(str, cameras())):
            return f"there is no such camera; this machine has: {there}"
        return "there is no such camera; this machine has none: connect one (for a container, pass it with --device)"
    if os.access(device, os.R_OK | os.W_OK):
        return None
    group = _group(device)
    return f"no permission to use it; join the group {group} (sudo usermod -aG {group} $USER), and log in again"


def _group(device: str) -> str:
    """The group that may use a device; ``video`` on nearly every system."""
    try:
        return Path(device).group()
    except (OSError, KeyError):
        return "video"
