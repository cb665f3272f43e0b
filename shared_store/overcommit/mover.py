"""The interface between a workload's agent and the engine that it speaks for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Holdings:
    """Private bytes of a workload by device.

    Attributes:
        private: on the device now.
        stays: those of them that a swap does not free.
        needs: on the device when it is resident.
        moved: bytes that the last move copied between device and host.
        steps: seconds of the last move, by step.
        shared: bytes of shared weights that it maps when it is resident. Only counted for a return without a store.
    """

    private: Mapping[str, int] = field(default_factory=dict)
    stays: Mapping[str, int] = field(default_factory=dict)
    needs: Mapping[str, int] = field(default_factory=dict)
    moved: int = 0
    steps: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)


class Steps:
    """Times the steps of a move.

    Attributes:
        seconds: by step.
    """

    def __init__(self) -> None:
        """Begin the first step."""
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def end(self, step: str) -> None:
        """Say that a step has ended, and the next one begins."""
        now = time.monotonic()
        self.seconds[step], self._began = now - self._began, now


class Mover(Protocol):
    """Moves one workload. The agent calls one method at a time, from a thread of its own."""

    def leave(self, *, active: bool, within_s: float, reached: Reached) -> Holdings:
        """Stop at a step boundary, copy private memory to the host, and unmap it and shared weights.

        Args:
            active: also with requests running or waiting.
            within_s: seconds until it must have declined or begun to leave; 0: no limit.
            reached: called with ``leaving`` when all steps have ended and it begins to copy.

        Raises:
            DeclinedError: it goes on, and everything is in place.
        """

    def come_back(self) -> Holdings:
        """Map and fill everything again, and let steps start. The memory was granted.

        Raises:
            OutOfMemoryError: the memory cannot be had. Everything that was mapped is unmapped again.
        """

    def prepare_checkpoint(self) -> None:
        """Unregister host memory from the driver, which is about to take the process off its GPU. It is away.

        From here on until :meth:`come_back`, no other method is called.

        Raises:
            DeclinedError: it cannot be taken off.
        """

    def holdings(self) -> Holdings:
        """Return the bytes that it has now."""


class Reached(Protocol):
    """Hears of a step of a move."""

    def __call__(self, step: str, /) -> None:
        """Report the step."""
