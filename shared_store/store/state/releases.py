"""Released segments whose memory may still be allocated, because the keeper has not confirmed that it closed them.

A segment's memory is free once no process has a descriptor or a mapping of it. The store closes its descriptor when it
releases a segment, the keeper when it has read the store's message. Until it confirms that, the bytes count as used.

A keeper that does not confirm in time may be stopped, or busy. Its segments are *overdue* then: nobody waits for them
any more, and they count as used until the confirmation arrives after all, or the keeper ends. A keeper of an earlier
version confirms nothing: its segments count as free after the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CONFIRMED_WITHIN_S: Final = 5.0
"""Seconds that a keeper has to confirm a release: far more than it needs, unless it does not run."""


@dataclass
class Release:
    """A release that was not confirmed: its device, size in bytes, and monotonic time."""

    device: str
    nbytes: int
    since: float
    overdue: bool = False


class Releases:
    """Releases by segment id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` returns monotonic seconds."""
        self._clock = clock
        self._releases: dict[int, Release] = {}
        self.confirmed_by_keeper = False
        """Whether the keeper confirms releases."""

    def begin(self, segment: int, device: str, nbytes: int) -> None:
        """Add a segment that was released now."""
        self._releases[segment] = Release(device, nbytes, self._clock())

    def confirm(self, segment: int) -> None:
        """Remove a segment whose memory is free. Without effect for one that was removed."""
        self._releases.pop(segment, None)

    def confirm_all(self) -> None:
        """Remove all segments: the keeper ended, and its descriptors with it."""
        self._releases.clear()

    def expire(self) -> int:
        """Look for segments whose time is over; return the number of those that are overdue from now on."""
        latest = self._clock() - CONFIRMED_WITHIN_S
        late = [segment for segment, one in self._releases.items() if one.since <= latest and not one.overdue]
        for segment in late:
            if self.confirmed_by_keeper:
                self._releases[segment].overdue = True
            else:
                del self._releases[segment]
        return len(late) if self.confirmed_by_keeper else 0

    def left_s(self, device: str) -> float:
        """Return the seconds left to confirm the device's latest release; 0 if there is nothing to wait for."""
        latest = [one.since for one in self._releases.values() if one.device == device and not one.overdue]
        return max(0.0, max(latest) + CONFIRMED_WITHIN_S - self._clock()) if latest else 0.0

    def nbytes(self, device: str) -> int:
        """Return the bytes of a device that may still be allocated."""
        return sum(one.nbytes for one in self._releases.values() if one.device == device)

    def overdue(self, device: str | None = None) -> tuple[int, int]:
        """Return the number of overdue segments of a device, or of all, and their bytes."""
        sizes = [one.nbytes for one in self._releases.values() if one.overdue and device in {None, one.device}]
        return len(sizes), sum(sizes)
