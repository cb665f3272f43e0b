"""A client's session, as handlers see it, and the form of their answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_store.base.errors import PermissionDeniedError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.state.clients import Client


@dataclass(frozen=True)
class Session:
    """A greeted connection.

    Attributes:
        client: the process at its other end.
        gone: set when the connection ends.
        push: sends a push of a kind with a detail.
    """

    client: Client
    gone: asyncio.Event
    push: Callable[[str, str], None]

    def require_own_uid(self, action: str) -> None:
        """Raise :class:`PermissionDeniedError` for another user's client, where the store cannot verify its claim."""
        if self.client.uid != os.getuid():
            raise PermissionDeniedError(
                f"uid {self.client.uid} may not {action} of the store of uid {os.getuid()}; ask its owner"
            )


@dataclass(frozen=True)
class Answer:
    """The reply to a request, and the descriptors that are sent with it."""

    reply: messages.Reply
    fds: OwnedFds = field(default_factory=OwnedFds)
