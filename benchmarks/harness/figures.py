"""Figures: medians, with the values behind them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Figures:
    """Results of a part: one number by name, and the values behind it.

    Attributes:
        numbers: Medians and single values, by name.
        raw: The values of each median, by the same name.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, values: Iterable[float]) -> None:
        """Record the median of ``values``, and the values."""
        self.raw[name] = [round(value, 6) for value in values]
        self.numbers[name] = round(statistics.median(self.raw[name]), 4)


def median_of(values: Iterable[float]) -> dict[str, Any]:
    """Return a median with its values, in the form that ``report/summary.py`` reduces to the median."""
    known = list(values)
    return {"median": statistics.median(known), "all": known}


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the smallest value of a sorted sequence that is not below ``percent`` % of the values."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def seconds(call: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
