"""A model (checkpoint or exported file) against a labelled split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from petseg.data import Pair, read_pair
from petseg.metrics import Border, Histogram, PixelCounts, counts, histogram
from petseg.model import AttentionUNet, normalize
from petseg_runtime import images

__all__ = ["Evaluation", "Run", "evaluate", "torch_run"]

U8: TypeAlias = npt.NDArray[np.uint8]
#: What every model is here: uint8 [N, H, W, 3] RGB in, uint8 [N, H, W] probability out.
Run: TypeAlias = Callable[[U8], U8]


@dataclass(frozen=True)
class Evaluation:
    """One histogram per photo; every metric, reading and threshold follows from them.

    Attributes:
        names: The photos, in order.
        histograms: int64 [photos, 3, 256]; see :func:`petseg.metrics.histogram`.
    """

    names: tuple[str, ...]
    histograms: Histogram

    @property
    def total(self) -> Histogram:
        """Counts summed over the split, int64 [3, 256]."""
        return self.histograms.sum(axis=0)  # type: ignore[no-any-return]

    def counts(self, threshold: float, border: Border = Border.BACKGROUND) -> PixelCounts:
        """Pixel counts summed over the split."""
        return counts(self.total, threshold, border)

    def image_ious(self, threshold: float, border: Border = Border.BACKGROUND) -> npt.NDArray[np.float64]:
        """IoU of each photo, float64 [photos]; 1 where there is no pet and none was found."""
        return np.array([counts(hist, threshold, border).iou for hist in self.histograms])

    def summary(self, threshold: float) -> dict[str, Any]:
        """The headline reading at the top level, the others below; JSON values."""
        readings = {
            str(border): {
                **self.counts(threshold, border).ratios(),
                "mean_image_iou": float(self.image_ious(threshold, border).mean()),
                "pixels": self.counts(threshold, border).as_dict(),
            }
            for border in Border
        }
        headline = readings[Border.BACKGROUND]
        ratios = {name: headline[name] for name in ("iou", "dice", "accuracy", "precision", "recall")}
        without_pet = [n for n, hist in zip(self.names, self.histograms, strict=True) if not hist[0].any()]
        return {
            "schema_version": 1,
            **ratios,
            "mean_image_iou": headline["mean_image_iou"],
            "threshold": threshold,
            "border": str(Border.BACKGROUND),
            "photos": len(self.names),
            "photos_without_pet": without_pet,
            "readings": readings,
        }


def evaluate(
    run: Run, pairs: Sequence[Pair], height: int, width: int, *, batch: int = 8, watch: Callable[[int], None] | None = None
) -> Evaluation:
    """Segment every photo and count, at each trimap's own resolution.

    Args:
        run: The model.
        pairs: Photos with their truth.
        height: The model's input height.
        width: The model's input width.
        batch: Photos per call of ``run``.
        watch: Called with the number of photos done so far.

    Raises:
        DataError: A photo or mask cannot be read.
    """
    found: list[Histogram] = []
    for chunk in _chunks(pairs, batch):
        truths, inputs = [], []
        for pair in chunk:
            photo, trimap = read_pair(pair)
            inputs.append(images.to_model(photo, height, width))
            truths.append(trimap)
        for probability, trimap in zip(run(np.stack(inputs)), truths, strict=True):
            found.append(histogram(images.from_model(probability, *trimap.shape), trimap))
        if watch:
            watch(len(found))
    return Evaluation(tuple(pair.name for pair in pairs), np.stack(found))


def torch_run(model: AttentionUNet, device: torch.device | str = "cpu") -> Run:
    """A network in PyTorch, float32, as a :data:`Run`: the reference that exports are held against."""
    model = model.to(device).eval()

    def run(batch: U8) -> U8:
        with torch.inference_mode():
            logits = model(normalize(torch.from_numpy(batch).to(device)))
            probability = torch.round(255 * torch.sigmoid(logits.float().squeeze(1)))
        return probability.to(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]

    return run


def _chunks(pairs: Sequence[Pair], size: int) -> Iterable[Sequence[Pair]]:
    return (pairs[i : i + size] for i in range(0, len(pairs), size))
