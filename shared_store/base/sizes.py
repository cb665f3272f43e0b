"""Sizes in bytes, written with a unit."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str) -> int | None:
    """Return the bytes of ``64GiB``, ``1.5 TiB`` or ``1048576``; None for any other text, and for zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:iB)?|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        return None
    number, prefix = match.groups()
    power = " KMGT".index((prefix or " ").upper())
    return round(float(number) * 1024**power) or None


def format_size(nbytes: int) -> str:
    """Format bytes as ``1.50 GiB``, with three significant digits."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"
