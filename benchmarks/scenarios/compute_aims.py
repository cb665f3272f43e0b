"""What the benchmark ``compute`` aims at, and figures that compare parts with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.figures import Figures
from benchmarks.scenarios.compute_setup import PLAIN, WAYS

LOADS = ("steps", "engines")

NO_WORSE = 1.05
"""Windows of one way differ by so much."""


@dataclass(frozen=True)
class Aim:
    """A figure's limit. ``most`` is None where the figure should be at least ``least``."""

    figure: str
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        """Return whether a value is within the limit."""
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)

    def line(self, value: float) -> str:
        """Return a line that says how a value compares with the limit."""
        limit = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        return f"{self.figure}: {value:.4g} ({limit}{'' if self.met(value) else ': not met'})"


def _aims() -> Iterator[Aim]:
    for load in LOADS:
        yield Aim(f"{load}_hold_0_p50_ratio", most=1.10)
        yield Aim(f"{load}_hold_0_p99_ratio", most=1.25)
        yield Aim(f"{load}_hold_0_together_of_plain", least=0.95)
        yield Aim(f"{load}_hold_0_requests_together_of_plain", least=0.95)
        yield Aim(f"{load}_shares_two_points", most=5)
        for count in ("two", "many"):
            for percent in ("p50", "p99"):
                yield Aim(f"{load}_{count}_{percent}_of_plain", most=NO_WORSE)
        yield Aim(f"{load}_shares_many_least", least=0.8)
    yield Aim("gate_of_synthetic_step", most=0.005)
    yield Aim("gate_of_engine_step", most=0.005)


AIMS = tuple(_aims())


def compared(result: Mapping[str, Any]) -> Figures:
    """Return the throughput of each way over that of time slicing, as far as both were measured."""
    found = Figures()
    for load in LOADS:
        for kind in ("together", "requests_together"):
            plain = result.get(f"{load}_{PLAIN.name}_{kind}")
            for way in WAYS:
                one = result.get(f"{load}_{way}_{kind}")
                if plain and one is not None and way != PLAIN.name:
                    found.numbers[f"{load}_{way}_{kind}_of_plain"] = round(one / plain, 4)
    return found


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each aim whose figure was measured."""
    return [aim.line(result[aim.figure]) for aim in AIMS if aim.figure in result]
