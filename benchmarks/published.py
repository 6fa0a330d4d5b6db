"""Figures that others published, and the readings of the border, for benchmarks and for the pages made from them."""

from __future__ import annotations

from typing import Any, Final

from petseg import metrics

#: For each reading of the border, which threshold was chosen for it.
CHOSEN: Final = {"background": "own", "pet": "cutout", "ignored": "ignored_border"}

#: How a record marks a figure on the official test photos.
TEST_SPLIT: Final = "test split"

#: The published network that petseg trains, exports and runs.
PUBLISHED: Final[dict[str, Any]] = {
    "name": "published attention U-Net, 29.3 M parameters, from scratch",
    "source": "given to us; we know no publication to cite",
    "data": f"{TEST_SPLIT}, 3669 photos; the input size is not given",
    "readings": {"background": metrics.PUBLISHED},
}

#: The best figures that we know of, with an encoder pretrained on ImageNet.
PRETRAINED: Final[dict[str, Any]] = {
    "name": "FPN with ResNet-34 pretrained on ImageNet, 23.2 M",
    "source": "segmentation_models.pytorch, pets example; the least and the best that it shows",
    "data": TEST_SPLIT,
    "readings": {"pet": {"iou": [0.9125, 0.9156]}},
}

#: Figures that were not measured with this program: the model, its test photos, and the readings of the border.
ELSEWHERE: Final[tuple[dict[str, Any], ...]] = (
    PUBLISHED,
    PRETRAINED,
    {
        "name": "the same FPN from scratch",
        "source": "a public model card",
        "data": TEST_SPLIT,
        "readings": {"pet": {"iou": 0.7063}},
    },
    {
        "name": "ISNet, by an earlier measurement of ours",
        "source": "without this program",
        "data": "100 original-size photos",
        "readings": {"background": {"iou": 0.724}, "pet": {"iou": 0.778}, "ignored": {"iou": 0.86}},
    },
)
