"""The list of cameras, and the reasons why one cannot be used."""

from __future__ import annotations

import grp
import os
from pathlib import Path

import pytest

from petseg_runtime import cameras
from petseg_runtime.cameras import Camera, why_not


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders in place of /dev and of the kernel's camera names."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(cameras, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(cameras, "_NAMES", tmp_path / "sys")
    return tmp_path / "dev"


def add(devices: Path, device: str, name: str = "") -> str:
    (devices / device).touch()
    if name:
        (devices.parent / "sys" / device).mkdir(parents=True)
        (devices.parent / "sys" / device / "name").write_text(f"{name}\n")
    return str(devices / device)


def test_cameras_are_listed_by_number_with_their_names(devices: Path) -> None:
    ten, two = add(devices, "video10"), add(devices, "video2", "HD Webcam: HD Webcam")
    for other in ("video", "video2x", "vbi0"):
        add(devices, other)
    assert cameras.cameras() == (Camera(two, "HD Webcam: HD Webcam"), Camera(ten))
    assert [str(camera) for camera in cameras.cameras()] == [f"{two} (HD Webcam: HD Webcam)", ten]


def test_a_missing_camera_error_lists_the_existing_ones(devices: Path) -> None:
    missing = str(devices / "video7")
    assert why_not(missing) == (
        "there is no such camera; this machine has none: connect one (for a container, pass it with --device)"
    )
    there = add(devices, "video0", "Webcam")
    assert why_not(missing) == f"there is no such camera; this machine has: {there} (Webcam)"
    assert why_not(there) is None


def test_without_permission_the_group_and_the_command_are_named(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = add(devices, "video0")
    monkeypatch.setattr(os, "access", lambda path, mode: (str(path), mode) != (camera, os.R_OK | os.W_OK))
    group = Path(camera).group()
    assert why_not(camera) == (
        f"no permission to use it; join the group {group} (sudo usermod -aG {group} $USER), and log in again"
    )

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(grp, "getgrgid", nobody)
    assert "(sudo usermod -aG video $USER)" in str(why_not(camera))
