"""Text that other processes choose, in a form that logs, terminals and messages can carry.

Relies on ``str.isprintable``: control characters, line separators and direction marks are not printable.
"""

from __future__ import annotations

CUT = "…"


def one_line(text: str, longest: int) -> str:
    """Escape characters that are not printable, and cut the text.

    Args:
        text: any text.
        longest: most characters of the result; a text that is cut ends with ``…``.
    """
    shown = text[:longest] if text.isprintable() else escape(text[:longest])
    return shown if len(shown) <= longest and len(text) <= longest else shown[: longest - 1] + CUT


def escape(text: str) -> str:
    r"""Replace characters that are not printable by their escapes in Python, such as ``\n`` and ``\x1b``."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
