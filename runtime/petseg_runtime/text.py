"""How untrusted text is shown."""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: object) -> str:
    """Text with all that is not printable escaped: a file's name may hold line breaks, or bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
