"""petseg's runtime: a pet segmentation model on images, without torch."""

from __future__ import annotations

__version__ = "0.1.0"
