"""How long to wait before trying again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def delays(first_s: float = 0.1, most_s: float = 5.0) -> Iterator[float]:
    """Seconds before each next attempt: doubling up to ``most_s``, less up to half by chance.

    The chance keeps the stores of a cluster from coming back to a restarted server all at once.
    """
    delay = first_s
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret
        delay = min(most_s, delay * 2)
