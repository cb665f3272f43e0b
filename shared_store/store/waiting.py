"""Clients that wait for an effect: an ``Open`` for its publisher, an ``Acquire`` for its turn.

A wait ends with its effect, or when the client cancels it, leaves, or disconnects. A cancel removes the client from the
queue at once, in the same step of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_store.base.errors import ConnectionLostError
from shared_store.store.session import Session, cancelled
from shared_store.store.state.clients import Client
from shared_store.store.state.effects import Answer, HasTurn

_Key = tuple[str, str, int]


@dataclass(eq=False)
class _Wait:
    """A wait. ``revoked``: the client left after the effect, and before the request was answered."""

    effect: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    revoked: bool = False

    def end(self) -> None:
        """End the wait as cancelled."""
        self.revoked = True
        self.effect.cancel()


class Waiters:
    """The waits under way; a client has at most one for a model or a turn."""

    def __init__(self) -> None:
        self._waits: dict[_Key, _Wait] = {}

    async def for_model(
        self, session: Session, key: str, publisher: Client | None, leave: Callable[[], None]
    ) -> Answer:
        """Wait until the publisher of a model commits or aborts. Arguments and errors as of :meth:`_wait`."""
        return await self._wait(session, ("model", key, session.client.number), publisher, leave)

    async def for_turn(self, session: Session, name: str, holder: Client | None, leave: Callable[[], None]) -> None:
        """Wait until the client has the turn. Arguments and errors as of :meth:`_wait`."""
        await self._wait(session, ("turn", name, session.client.number), holder, leave)

    def answer(self, effect: Answer) -> None:
        """End the wait that this effect answers; without effect if there is none."""
        if isinstance(effect, HasTurn):
            wait = self._waits.get(("turn", effect.name, effect.client))
        else:
            wait = self._waits.get(("model", effect.key, effect.client))
        if wait is not None and not wait.effect.done():
            wait.effect.set_result(effect)

    def left_model(self, key: str, client: int) -> None:
        """End a client's wait for a model that it has left. Without effect if it does not wait."""
        self._left(("model", key, client))

    def left_turn(self, name: str, client: int) -> None:
        """End a client's wait for a turn whose queue it has left. Without effect if it does not wait."""
        self._left(("turn", name, client))

    def all(self) -> list[_Key]:
        """Return the waits under way."""
        return list(self._waits)

    def _left(self, key: _Key) -> None:
        wait = self._waits.pop(key, None)
        if wait is not None:
            wait.end()

    async def _wait(self, session: Session, key: _Key, blocker: Client | None, leave: Callable[[], None]) -> Answer:
        """Wait for an answer; push the client that blocks.

        Args:
            session: of the client that waits.
            key: what it waits for.
            blocker: the client that it waits for.
            leave: removes it from the queue, when it cancels the request before the effect.

        Raises:
            RequestCancelledError: it cancelled the request, or left; it is not in the queue any more.
            ConnectionLostError: it disconnected. It is still in the queue, until its session ends.
        """
        if blocker is not None:
            session.push("waiting", f"{blocker.process} {blocker.name}".strip())
        wait = self._waits[key] = _Wait()

        def stop() -> None:
            if not wait.effect.done():
                wait.end()
                leave()

        gone: asyncio.Future[object] = asyncio.ensure_future(session.gone.wait())
        try:
            with session.pending.waiting(stop):
                await asyncio.wait((wait.effect, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if self._waits.get(key) is wait:
                del self._waits[key]
        if wait.revoked:
            raise cancelled()
        if not wait.effect.done():
            raise ConnectionLostError("the client disconnected while it waited")
        return wait.effect.result()
