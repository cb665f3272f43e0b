"""Clients that wait for an effect: an ``Open`` for its publisher, an ``Acquire`` for its turn."""

from __future__ import annotations

import asyncio

from shared_store.base.errors import ConnectionLostError
from shared_store.store.session import Session
from shared_store.store.state.clients import Client
from shared_store.store.state.effects import Answer, HasTurn

_Key = tuple[str, str, int]


class Waiters:
    """The waits under way; a client has at most one for a model or a turn."""

    def __init__(self) -> None:
        self._futures: dict[_Key, asyncio.Future[Answer]] = {}

    async def for_model(self, session: Session, key: str, publisher: Client | None) -> Answer:
        """Wait until the publisher of a model commits or aborts. Raises as :meth:`_wait` does."""
        return await self._wait(session, ("model", key, session.client.number), publisher)

    async def for_turn(self, session: Session, name: str, holder: Client | None) -> None:
        """Wait until the client has the turn. Raises as :meth:`_wait` does."""
        await self._wait(session, ("turn", name, session.client.number), holder)

    def answer(self, effect: Answer) -> None:
        """End the wait that this effect answers; without effect if there is none."""
        if isinstance(effect, HasTurn):
            future = self._futures.get(("turn", effect.name, effect.client))
        else:
            future = self._futures.get(("model", effect.key, effect.client))
        if future is not None and not future.done():
            future.set_result(effect)

    def all(self) -> list[_Key]:
        """Return the waits under way."""
        return list(self._futures)

    async def _wait(self, session: Session, key: _Key, blocker: Client | None) -> Answer:
        """Wait for an answer; push the client that blocks.

        Raises:
            ConnectionLostError: the waiting client disconnected.
        """
        if blocker is not None:
            session.push("waiting", f"{blocker.process} {blocker.name}".strip())
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures[key] = future
        gone: asyncio.Future[object] = asyncio.ensure_future(session.gone.wait())
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            del self._futures[key]
        if not future.done():
            raise ConnectionLostError("the client disconnected while it waited")
        return future.result()
