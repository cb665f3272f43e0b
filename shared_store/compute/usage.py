"""Device time by workload: measured where one workload computes, estimated where steps overlap. Pure.

Between two looks at the pages, each workload was busy for some time. If together they were busy for no longer than the
time that passed, each is charged what it was busy. Otherwise their steps overlapped: the time that passed is divided in
proportion, and marked as estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class Charge:
    """Seconds of its devices that a workload used between two looks; ``estimated``: steps overlapped."""

    seconds: float
    estimated: bool


def charge(busy: Mapping[int, float], devices: Mapping[int, AbstractSet[str]], passed: float) -> dict[int, Charge]:
    """Return what each workload used. On no device do the charges add up to more than the time that passed.

    Args:
        busy: seconds for which each was busy since the last look.
        devices: of each. Of several, the one counts on which most was done.
        passed: seconds since the last look.
    """
    passed = max(0.0, passed)
    bounded = {number: min(max(0.0, seconds), passed) for number, seconds in busy.items()}
    load: dict[str, float] = {}
    for number, seconds in bounded.items():
        for device in devices[number]:
            load[device] = load.get(device, 0.0) + seconds
    found: dict[int, Charge] = {}
    for number, seconds in bounded.items():
        most = max((load[device] for device in devices[number]), default=seconds)
        overlapped = most > passed and seconds > 0
        found[number] = Charge(seconds * passed / most if overlapped else seconds, overlapped)
    return found
