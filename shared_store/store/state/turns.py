"""Turns: named mutexes that one client holds at a time, in order of request, until it yields or disconnects."""

from __future__ import annotations

from collections import deque

from shared_store.store.state.effects import HasTurn


class Turns:
    """All turns of a store."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[int]] = {}

    def acquire(self, name: str, client: int) -> bool:
        """Append a client to the queue of a turn; return whether the turn is its own at once.

        Raises:
            ValueError: the client is in the queue already.
        """
        queue = self._queues.setdefault(name, deque())
        if client in queue:
            raise ValueError(f"client {client} has asked for turn {name!r} before")
        queue.append(client)
        return queue[0] == client

    def leave(self, name: str, client: int) -> list[HasTurn]:
        """Release a turn, or leave its queue. The next client in the queue gets the turn."""
        queue = self._queues.get(name)
        if queue is None or client not in queue:
            return []
        held = queue[0] == client
        queue.remove(client)
        if not queue:
            del self._queues[name]
            return []
        return [HasTurn(name, queue[0])] if held else []

    def lost(self, client: int) -> list[HasTurn]:
        """Remove a client from all queues."""
        return [effect for name in list(self._queues) for effect in self.leave(name, client)]

    def holder(self, name: str) -> int | None:
        """Return the client that holds the turn."""
        queue = self._queues.get(name)
        return queue[0] if queue else None
