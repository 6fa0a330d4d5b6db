"""Print every package of the current environment, with its size and requirements, as JSON on stdout."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, Final

#: Packages that serve NVIDIA GPUs only.
_CUDA: Final = ("nvidia-", "cuda-", "triton")


def about(distribution: Distribution) -> dict[str, Any]:
    """A package's version, requirements, bytes on disk, and how many of these serve NVIDIA GPUs only."""
    name = distribution.metadata["Name"]
    paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    sizes = [(path.name, path.stat().st_size) for path in paths if path.exists()]  # some bytecode was never compiled
    only_cuda = name.lower().startswith(_CUDA)
    return {
        "version": distribution.version,
        "requires": distribution.requires or [],
        "bytes": sum(size for _, size in sizes),
        "cuda_bytes": sum(size for file, size in sizes if only_cuda or ("cuda" in file and ".so" in file)),
    }


if __name__ == "__main__":
    print(json.dumps({found.metadata["Name"]: about(found) for found in importlib.metadata.distributions()}))
