"""Named leases: one client at a time, in the order of asking, for as long as its connection lives."""

from __future__ import annotations

from collections import deque


class Leases:
    """All named leases of a store. Methods return the client that holds a lease next, to be told so."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[int]] = {}

    def acquire(self, name: str, client: int) -> bool:
        """Get in line; True when the lease is the client's at once. Raises ``ValueError`` when it is in line."""
        queue = self._queues.setdefault(name, deque())
        if client in queue:
            raise ValueError(f"client {client} has asked for lease {name!r} before")
        queue.append(client)
        return queue[0] == client

    def leave(self, name: str, client: int) -> int | None:
        """Give the lease up, or the place in line. Returns who holds it because of that."""
        queue = self._queues.get(name)
        if queue is None or client not in queue:
            return None
        held = queue[0] == client
        queue.remove(client)
        if not queue:
            del self._queues[name]
            return None
        return queue[0] if held else None

    def lost(self, client: int) -> list[tuple[str, int]]:
        """The client is gone. Returns the leases that pass on, and to whom."""
        heirs = [(name, self.leave(name, client)) for name in list(self._queues)]
        return [(name, heir) for name, heir in heirs if heir is not None]

    def holder(self, name: str) -> int | None:
        """Who holds the lease."""
        queue = self._queues.get(name)
        return queue[0] if queue else None
