"""Make two environments in ``.venv-peers/``, petseg's light runtime and its peers, and measure their size on disk.

They are made again when the pinned versions or petseg's code change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import records

FOLDER: Final = records.ROOT / ".venv-peers"
REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")

#: The output of ``installed.py`` for each package, by canonical name.
Packages: TypeAlias = Mapping[str, Mapping[str, Any]]


def petseg_environment() -> Path:
    """The interpreter with the light runtime and both CPU engines, installed as by a user: not editable."""
    parts = [records.ROOT / "pyproject.toml", REQUIREMENTS]
    for folder in ("petseg", "export", "runtime"):
        files = (records.ROOT / folder).rglob("*")
        parts += sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts)
    return environment("petseg", ["--constraint", str(REQUIREMENTS), f"{records.ROOT}[cpu,openvino]"], parts)


def peers_environment() -> Path:
    """The interpreter with all peers."""
    return environment("peers", ["--requirement", str(REQUIREMENTS)], [REQUIREMENTS])


def environment(name: str, what: list[str], parts: Iterable[Path]) -> Path:
    """Return the interpreter of an environment; make it first if it is missing or was made from other files.

    Args:
        name: Name of its folder.
        what: Arguments of ``pip install``.
        parts: The files that it is made from.

    Raises:
        SystemExit: pip failed; it has printed the reason.
    """
    folder, wanted = FOLDER / name, stamp_of(parts)
    stamp, python = folder / "stamp", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    click.echo(f"installing into {folder.relative_to(records.ROOT)} ...", err=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=False).returncode:
        sys.exit(f"{folder}: pip could not install {' '.join(what)}; see above, then run this again")
    stamp.write_text(wanted, encoding="utf-8")  # last, so that a broken install is repeated
    return python


def stamp_of(parts: Iterable[Path]) -> str:
    """A digest of files, their names and the Python version."""
    digest = hashlib.sha256(sys.version.encode())
    for part in parts:
        digest.update(f"\0{part.relative_to(records.ROOT)}\0".encode())
        digest.update(part.read_bytes())
    return digest.hexdigest()


def packages_of(python: Path) -> Packages:
    """All packages of an environment."""
    script = Path(__file__).with_name("installed.py")
    out = subprocess.run([python, "-I", str(script)], check=True, capture_output=True, text=True).stdout
    return {canonicalize_name(name): about for name, about in json.loads(out).items()}


def size_of(packages: Packages, roots: Iterable[str]) -> dict[str, float]:
    """The size of some packages with all their requirements, and how much of it serves NVIDIA GPUs only."""
    needed = closure(packages, roots)
    return {
        "packages": len(needed),
        "megabytes": round(sum(packages[name]["bytes"] for name in needed) / 1e6, 1),
        "of_these_cuda": round(sum(packages[name]["cuda_bytes"] for name in needed) / 1e6, 1),
    }


def closure(packages: Packages, roots: Iterable[str]) -> set[str]:
    """The installed packages that requirements such as ``petseg[cpu]`` depend on, themselves included.

    Raises:
        SystemExit: A requirement is not installed.
    """
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in packages:
            sys.exit(f"{requirement} is not installed: remove {FOLDER} and run this again")
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                asked = (Requirement(text) for text in packages[name]["requires"])
                todo += [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}
