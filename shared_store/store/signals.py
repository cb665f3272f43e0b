"""Signals of the store: that its state changed, and events by name. Observers subscribe, senders do not know them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class EventObserver(Protocol):
    """A function that receives events."""

    def __call__(self, kind: str, **fields: str | int) -> None:
        """Receive an event and its fields."""


class Signals:
    """Passes signals on to the observers, in the order of their subscriptions."""

    def __init__(self) -> None:
        self._on_change: list[Callable[[], None]] = []
        self._on_event: list[EventObserver] = []
        self._next_change: asyncio.Event | None = None

    def observe(self, on_change: Callable[[], None] | None = None, on_event: EventObserver | None = None) -> None:
        """Subscribe to changes, to events, or to both."""
        if on_change is not None:
            self._on_change.append(on_change)
        if on_event is not None:
            self._on_event.append(on_event)

    def changed(self) -> None:
        """Signal that the state changed."""
        for observer in self._on_change:
            observer()
        if self._next_change is not None:
            self._next_change.set()
            self._next_change = None

    def next_change(self) -> asyncio.Event:
        """Return an event that is set by the next change of the state."""
        if self._next_change is None:
            self._next_change = asyncio.Event()
        return self._next_change

    def event(self, kind: str, **fields: str | int) -> None:
        """Signal an event; ``kind`` and the fields' names are those of the catalog's event stream."""
        for observer in self._on_event:
            observer(kind, **fields)
