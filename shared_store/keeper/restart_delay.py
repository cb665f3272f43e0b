"""Delay before a store is restarted: none, unless stores keep ending soon after their start."""

from __future__ import annotations

STEADY_S = 5.0
"""Seconds after which a store counts as having started well."""

AT_ONCE = 3
"""Number of short lives in a row that are followed by a restart without delay."""

FIRST_S = 0.1
LONGEST_S = 5.0


class RestartDelay:
    """Counts short lives in a row. The delay doubles from :data:`FIRST_S` up to :data:`LONGEST_S`."""

    def __init__(self) -> None:
        self.short_lives = 0

    def after(self, lifetime_s: float) -> float:
        """Return the seconds to wait after a store ended ``lifetime_s`` seconds after its start."""
        self.short_lives = self.short_lives + 1 if lifetime_s < STEADY_S else 0
        delayed = self.short_lives - AT_ONCE
        return 0.0 if delayed <= 0 else min(LONGEST_S, FIRST_S * 2.0 ** min(delayed - 1, 16))
