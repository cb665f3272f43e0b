"""Durations in seconds, written with a unit."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float | None:
    """Return the seconds of ``300s``, ``1.5m``, ``250ms``, ``2h`` or ``300``; None for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        return None
    return float(match[1]) * _UNITS[match[2].lower()]
