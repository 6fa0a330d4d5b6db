"""Every package of the environment that runs this, with its size and its requirements, as JSON on stdout."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, Final

#: Packages that are there for NVIDIA GPUs alone.
_CUDA: Final = ("nvidia-", "cuda-", "triton")


def about(distribution: Distribution) -> dict[str, Any]:
    """Version, requirements, bytes of its files on disk, and how many of these serve NVIDIA GPUs only."""
    name = distribution.metadata["Name"]
    paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    sizes = [(path.name, path.stat().st_size) for path in paths if path.exists()]  # some bytecode was never compiled
    whole = name.lower().startswith(_CUDA)
    return {
        "version": distribution.version,
        "requires": distribution.requires or [],
        "bytes": sum(size for _, size in sizes),
        "cuda_bytes": sum(size for file, size in sizes if whole or ("cuda" in file and ".so" in file)),
    }


if __name__ == "__main__":
    print(json.dumps({found.metadata["Name"]: about(found) for found in importlib.metadata.distributions()}))
