"""petseg: one attention U-Net, from the training GPU to the device."""

from __future__ import annotations

from petseg_runtime import __version__

__all__ = ["__version__"]
