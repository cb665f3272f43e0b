"""Handlers of ``GetStatus``, ``Shutdown`` and ``Upgrade``: requests that concern the store's process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shared_store.base.status import Status
from shared_store.protocol import messages
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.session import Answer, Session


@dataclass(frozen=True, eq=False)
class ProcessRequests:
    """The store's process. ``stopping`` is set when a client asked it to end."""

    _keeper: KeeperLink
    _status: Callable[[], Awaitable[Status]]
    _stopping: asyncio.Event

    async def get_status(self, _session: Session, request: messages.GetStatus) -> Answer:
        """Answer with the store's snapshot."""
        return Answer(messages.StatusReply(request.id, await self._status()))

    async def shut_down(self, _session: Session, request: messages.Shutdown) -> Answer:
        """End the store. Clients keep their mappings."""
        self._keeper.request_stop()
        self._stopping.set()
        return Answer(messages.Done(request.id))

    async def upgrade(self, _session: Session, request: messages.Upgrade) -> Answer:
        """Replace keeper and store by those of another installation; success ends this process.

        Raises:
            UpgradeError: the upgrade failed, and this store goes on.
        """
        await self._keeper.upgrade(request.python, request.environment)
        return Answer(messages.Done(request.id))
