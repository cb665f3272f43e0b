"""How soon a store that died is started again: at once, unless it keeps dying as soon as it runs."""

from __future__ import annotations

STEADY_S = 5.0
"""A store that lived this long was well."""

AT_ONCE = 3
"""So many short lives in a row are no pattern yet."""

FIRST_S = 0.1
LONGEST_S = 5.0


class Pace:
    """Counts short lives in a row."""

    def __init__(self) -> None:
        self.short_lives = 0

    def delay(self, lifetime_s: float) -> float:
        """Seconds to wait now that a store has ended after ``lifetime_s``."""
        self.short_lives = self.short_lives + 1 if lifetime_s < STEADY_S else 0
        patient = self.short_lives - AT_ONCE
        return 0.0 if patient <= 0 else min(LONGEST_S, FIRST_S * 2.0 ** min(patient - 1, 16))
