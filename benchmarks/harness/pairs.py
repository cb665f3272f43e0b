"""Two systems measured in pairs, each first in every other pair, so that a drift of the machine cancels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness.figures import Figures

KINDS = ("stock", "wooly")
PAIRS = 5

Runs = dict[str, list[dict[str, Any]]]
"""Reports of the measured runs, by kind."""


def order(pair: int) -> Iterator[str]:
    """Return the kinds in the order of a pair."""
    return iter(KINDS) if pair % 2 else reversed(KINDS)


def run_pairs(run: Callable[[str], dict[str, Any]]) -> Runs:
    """Call ``run(kind)`` in pairs; the first pair is a warm-up and is not returned."""
    runs: Runs = {kind: [] for kind in KINDS}
    for pair in range(PAIRS + 1):
        for kind in order(pair):
            report = run(kind)
            if pair:
                runs[kind].append(report)
    return runs


def put_rates(found: Figures, name: str, ratio: str, runs: Runs, seconds: Callable[[dict[str, Any]], float]) -> None:
    """Record tokens per second of each kind as ``name_KIND``, and as ``ratio`` wooly over stock within each pair."""
    rates = {kind: [run["count"] / seconds(run) for run in runs[kind]] for kind in KINDS}
    for kind, values in rates.items():
        found.put(f"{name}_{kind}", values)
    found.put(ratio, [wooly / stock for stock, wooly in zip(rates["stock"], rates["wooly"], strict=True)])
