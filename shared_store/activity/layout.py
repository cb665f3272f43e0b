"""Layout of an activity page, version 1.

Little-endian words of 8 bytes, at fixed offsets. Each word is written by one aligned store of 8 bytes, which is atomic
on the supported machines, so a reader never sees half of a word. It may see the new state beside the old time of last
use: each word is meaningful alone.

======  ===============  ==========================================================================================
offset  word             content
======  ===============  ==========================================================================================
0       version          1; written by the store
8       state            bits 0 to 31: requests waiting; bits 32 to 62: requests running; bit 63: busy
16      last use         ``CLOCK_MONOTONIC`` in nanoseconds at which the last step ended; 0: none has
24      reserved         zero, up to 4,096 bytes
======  ===============  ==========================================================================================

*Busy* is set from the beginning of a step until a step ends with nothing left to run. The clock is that of the machine;
in another time namespace (``time_namespaces(7)``) it is offset, and the reader limits what that can do.
"""

from __future__ import annotations

from typing import Final, NamedTuple

VERSION: Final = 1
SIZE: Final = 4096
VERSION_WORD, STATE_WORD, LAST_USE_WORD = range(3)
"""Indexes of the words, of 8 bytes each."""

MOST_REQUESTS: Final = (1 << 20) - 1
"""Highest number of requests, running or waiting, that is believed. A page with more has no valid content."""

BUSY: Final = 1 << 63
_RUNNING_BITS: Final = (1 << 31) - 1
_WAITING_BITS: Final = (1 << 32) - 1


class Activity(NamedTuple):
    """The content of a page.

    Attributes:
        busy: True while a step runs or requests are left.
        idle_s: seconds since the last step ended; None before the first.
        running: requests that run.
        waiting: requests that wait.
    """

    busy: bool
    idle_s: float | None
    running: int
    waiting: int


def state_word(running: int, waiting: int) -> int:
    """Return the state after a step as a word. Numbers above :data:`MOST_REQUESTS` are cut to it."""
    if (running | waiting) > MOST_REQUESTS:
        running, waiting = min(running, MOST_REQUESTS), min(waiting, MOST_REQUESTS)
    return BUSY | running << 32 | waiting if running or waiting else 0


def decode(state: int, last_use_ns: int, now_ns: int) -> Activity | None:
    """Return the content of two words; None if it cannot be right.

    Args:
        state: any word of 8 bytes.
        last_use_ns: any word of 8 bytes.
        now_ns: ``CLOCK_MONOTONIC``; a last use after that counts as now.
    """
    running, waiting = (state >> 32) & _RUNNING_BITS, state & _WAITING_BITS
    if running > MOST_REQUESTS or waiting > MOST_REQUESTS:
        return None
    idle_s = max(0, now_ns - last_use_ns) / 1e9 if last_use_ns else None
    return Activity(bool(state & BUSY), idle_s, running, waiting)
