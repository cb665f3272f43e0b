"""Delays before the next attempt to connect."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first_s: float = 0.1, most_s: float = 5.0) -> Iterator[float]:
    """Yield the seconds to wait before each next attempt: doubling up to ``most_s``, times a random 0.5 to 1.

    The randomness spreads the reconnections of a cluster's stores to a server that restarted.
    """
    delay = first_s
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - not used as a secret
        delay = min(most_s, delay * 2)
