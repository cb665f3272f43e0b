"""Counters of events since the store started."""

from __future__ import annotations

import msgspec

from shared_store.base.status import Counters


class Counts:
    """Counts by the fields of :class:`shared_store.base.status.Counters`."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys((field.name for field in msgspec.structs.fields(Counters)), 0)

    def add(self, name: str) -> None:
        """Count one event. Raises :class:`KeyError` for a name that is no field."""
        self._counts[name] += 1

    def snapshot(self) -> Counters:
        """Return the counts as they are now."""
        return Counters(**self._counts)
