"""Whether a process's memory and descriptors are flat: samples over time, and the slope of a line through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

FEWEST = 3
"""Samples that a process must have to count."""


@dataclass(frozen=True)
class Sample:
    """A process at one moment. ``fds`` without those of clients and segments, whose number is the load's."""

    at: float
    pid: int
    anonymous: int
    fds: int


@dataclass
class Trend:
    """The samples of one role, which several processes play in turn.

    ``warm_up_s``: age from which a process's samples count. Before, it allocates what it will reuse.
    """

    warm_up_s: float
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Record a sample."""
        self.samples.append(sample)

    def figures(self) -> dict[str, float]:
        """Return slopes by the hour, and how much was observed.

        The slope is that of parallel lines, one for each process (each has a level of its own), fitted by least
        squares. Without processes that lived long enough it is 0, and ``observed_s`` says so.
        """
        lives = [life for life in self._lives() if len(life) >= FEWEST]
        return {
            "processes": len({sample.pid for sample in self.samples}),
            "samples": sum(map(len, lives)),
            "observed_s": round(sum(life[-1].at - life[0].at for life in lives), 1),
            "anonymous_bytes_per_hour": round(3600 * slope([_points(life, "anonymous") for life in lives])),
            "fds_per_hour": round(3600 * slope([_points(life, "fds") for life in lives]), 2),
        }

    def _lives(self) -> Iterable[list[Sample]]:
        by_pid: dict[int, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            by_pid[sample.pid].append(sample)
        for life in by_pid.values():
            yield [sample for sample in life if sample.at - life[0].at >= self.warm_up_s]


def slope(lines: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return the common slope of lines through several series of points, each of which has an intercept of its own."""
    above = below = 0.0
    for points in lines:
        x0 = sum(x for x, _ in points) / len(points)
        y0 = sum(y for _, y in points) / len(points)
        above += sum((x - x0) * (y - y0) for x, y in points)
        below += sum((x - x0) ** 2 for x, _ in points)
    return above / below if below else 0.0


def _points(life: Sequence[Sample], name: str) -> list[tuple[float, float]]:
    return [(sample.at, float(getattr(sample, name))) for sample in life]
