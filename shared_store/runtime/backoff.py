"""Delays before the next attempt: to connect again, and to start a store again that ended."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

STEADY_S: Final = 5.0
"""A store that ran this long counts as healthy."""

AT_ONCE: Final = 3
"""Short runs in a row after which the next start is delayed."""

FIRST_S: Final = 0.1
LONGEST_S: Final = 5.0


def delays(first_s: float = 0.1, most_s: float = 5.0) -> Iterator[float]:
    """Yield the seconds to wait before each next attempt: doubling up to ``most_s``, times a random 0.5 to 1.

    The randomness spreads the reconnections of a cluster's stores to a server that restarted.
    """
    delay = first_s
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - not used as a secret
        delay = min(most_s, delay * 2)


class Pace:
    """Delays the restart of a store that ends soon after each start."""

    def __init__(self) -> None:
        self.short_lives = 0

    def delay(self, lifetime_s: float) -> float:
        """Return the seconds to wait after a store that ran ``lifetime_s``; 0 restarts it at once."""
        self.short_lives = self.short_lives + 1 if lifetime_s < STEADY_S else 0
        late = self.short_lives - AT_ONCE
        return 0.0 if late <= 0 else min(LONGEST_S, FIRST_S * 2.0 ** min(late - 1, 16))
