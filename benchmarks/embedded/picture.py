"""The README's picture: sample photos, masks, cutouts (``python -m benchmarks.embedded.picture``)."""

from __future__ import annotations

import click
from PIL import Image

from benchmarks import records
from petseg_runtime import Segmenter, images, sample_photos

HEIGHT, GAP = 230, 8
SHOWN = ("Abyssinian_204", "american_bulldog_60", "Bengal_62", "chelsea")


def checkerboard(width: int, height: int) -> Image.Image:
    square = 10
    board = Image.new("RGBA", (width, height), "white")
    for y in range(0, height, square):
        for x in range((y // square % 2) * square, width, 2 * square):
            board.paste((215, 215, 215, 255), (x, y, x + square, y + square))
    return board


@click.command()
def main() -> None:
    """Make the picture of the README."""
    columns = []
    with Segmenter() as segmenter:
        for photo in (path for name in SHOWN for path in sample_photos() if path.stem == name):
            result, pixels = segmenter(photo), images.read(photo).pixels
            width = round(pixels.shape[1] * HEIGHT / pixels.shape[0])
            cutout = result.cutout().resize((width, HEIGHT), Image.Resampling.LANCZOS)
            board = checkerboard(width, HEIGHT)
            board.alpha_composite(cutout)
            pictures = [Image.fromarray(pixels), result.overlay(), board.convert("RGB")]
            columns.append([picture.resize((width, HEIGHT), Image.Resampling.LANCZOS) for picture in pictures])
    total = sum(column[0].width + GAP for column in columns) - GAP
    sheet = Image.new("RGB", (total, 3 * HEIGHT + 2 * GAP), "white")
    x = 0
    for column in columns:
        for row, picture in enumerate(column):
            sheet.paste(picture, (x, row * (HEIGHT + GAP)))
        x += column[0].width + GAP
    sheet.save(records.RESULTS / "embedded-samples.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
