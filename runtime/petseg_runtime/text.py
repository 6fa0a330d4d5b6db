"""Text for display: escapes untrusted text, puts numbers before nouns, and aligns columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["aligned", "counted", "shown"]


def aligned(rows: Sequence[Sequence[str]], words: int) -> Iterator[str]:
    """Yields rows as lines: the first ``words`` columns aligned to the left, the others (numbers) to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        yield "  ".join(
            text.ljust(width) if index < words else text.rjust(width) for index, (text, width) in cells
        ).rstrip()


def counted(number: int, noun: str) -> str:
    """Returns "1 photo" or "2 photos"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown(text: object) -> str:
    """Escapes all unprintable characters: a file name may contain line breaks, or bytes that are not valid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
