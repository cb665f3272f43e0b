"""A client's session, as handlers see it, and the form of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.roles import Roles
from shared_store.store.state.clients import Client


@dataclass(frozen=True)
class Session:
    """A greeted connection.

    Attributes:
        client: the process at its other end.
        gone: set when the connection ends.
        push: sends a push of a kind with a detail.
        roles: the store's administrators.
    """

    client: Client
    gone: asyncio.Event
    push: Callable[[str, str], None]
    roles: Roles = field(default_factory=Roles)

    def require_admin(self, action: str) -> None:
        """Raise :class:`PermissionDeniedError` unless the client is an administrator. ``action``: after "may not"."""
        self.roles.require_admin(self.client, action)


@dataclass(frozen=True)
class Answer:
    """The reply to a request, and the descriptors that are sent with it."""

    reply: messages.Reply
    fds: OwnedFds = field(default_factory=OwnedFds)
