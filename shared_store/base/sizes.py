"""Sizes in bytes, written with a unit."""

from __future__ import annotations

import re


def parse_size(text: str) -> int | None:
    """Return the bytes of ``64GiB``, ``1.5 TiB`` or ``1048576``; None for any other text, and for zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:iB)?|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        return None
    number, prefix = match.groups()
    power = " KMGT".index((prefix or " ").upper())
    return round(float(number) * 1024**power) or None
