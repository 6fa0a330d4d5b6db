"""Escapes untrusted text for display."""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: object) -> str:
    """Escapes all unprintable characters: a file name may contain line breaks, or bytes that are not valid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
