"""Text for display: escapes untrusted text, and puts numbers before nouns."""

from __future__ import annotations

__all__ = ["counted", "shown"]


def counted(number: int, noun: str) -> str:
    """Returns "1 photo" or "2 photos"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown(text: object) -> str:
    """Escapes all unprintable characters: a file name may contain line breaks, or bytes that are not valid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
