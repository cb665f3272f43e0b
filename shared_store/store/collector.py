"""The garbage collector's policy in a store, whose objects are many, last long, and form no cycles.

A full collection visits every container in the process, and nothing else happens meanwhile. So what a publication left
is excluded from later collections (:func:`gc.freeze`): it is freed by its reference counts, as nearly everything in a
store is. Young objects are collected as usual, and full collections visit what came since.

Relies on structs and dictionaries of the state being without cycles. A cycle among excluded objects is never freed.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 10_000
"""Objects made, less those freed, until the youngest are collected. Python's 700 would be many small pauses."""

PUBLICATIONS: Final = 16
"""Models that come into the store until what they left is excluded from collections."""

_COMING: Final = frozenset({"published", "model_returned"})


class Collector:
    """Applies the policy to this process."""

    def __init__(self) -> None:
        """Set the threshold of young objects."""
        gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
        self._came = 0

    def event(self, kind: str, **_fields: str | int) -> None:
        """Count an event that brings a model into the store."""
        if kind in _COMING:
            self._came += 1
            if self._came >= PUBLICATIONS:
                self.settle()

    def settle(self) -> None:
        """Exclude all objects of this moment from later collections, but for young garbage, which is freed."""
        self._came = 0
        gc.collect(1)
        gc.freeze()
