"""Opens that wait for an earlier store's model: its segments exist in clients only, or are being verified."""

from __future__ import annotations

import asyncio

from shared_store.store.session import Session


class Arrivals:
    """Models that may be offered soon, and the opens that wait for them."""

    def __init__(self) -> None:
        self._expected: dict[str, asyncio.Event] = {}

    def expect(self, key: str) -> None:
        """Queue opens of the model from here on, until it is :meth:`settled`."""
        self._expected.setdefault(key, asyncio.Event())

    def settled(self, key: str) -> None:
        """Continue the opens of a model: it is committed, or will not arrive."""
        expected = self._expected.pop(key, None)
        if expected is not None:
            expected.set()

    async def wait(self, key: str, session: Session) -> None:
        """Wait while the model is expected, or until the waiting client has disconnected.

        Raises:
            RequestCancelledError: the client cancelled its request.
        """
        expected = self._expected.get(key)
        if expected is not None:
            await session.first_of(expected)
