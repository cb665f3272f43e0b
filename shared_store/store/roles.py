"""Roles of clients: which requests only administrators may make, and who is an administrator.

An administrator is a process of the store's own uid, of root, or one that ``--admin-uid`` or ``--admin-group`` names.
Every client that may connect may attach, publish and read the status; none of that makes it an administrator.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shared_store.base.errors import PermissionDeniedError
from shared_store.protocol import messages
from shared_store.store.state.clients import Client

ADMIN_REQUESTS: Final[Mapping[type[messages.Request], str]] = {
    messages.Shutdown: "stop the store",
    messages.Upgrade: "replace the store by another version",
    messages.Remove: "remove models",
    messages.Pin: "pin or unpin models",
    messages.Compact: "compact memory",
}
"""The requests that only administrators may make, and what they do. The dispatch checks them before their handlers.

A request that changes settings or swaps another workload out belongs here, too. A handler that depends on more than the
request's type calls :meth:`Roles.require_admin` itself: see the handler of ``Quarantine``.
"""


@dataclass(frozen=True)
class Roles:
    """The administrators of a store.

    Attributes:
        uids: users who are administrators besides the store's own and root.
        gid: a group whose members are.
        own_uid: the store's user.
    """

    uids: frozenset[int] = frozenset()
    gid: int | None = None
    own_uid: int = field(default_factory=os.getuid)

    def is_admin(self, uid: int, groups: frozenset[int]) -> bool:
        """Return True for the credentials of an administrator."""
        return uid in {0, self.own_uid} or uid in self.uids or (self.gid is not None and self.gid in groups)

    def require_admin(self, client: Client, action: str) -> None:
        """Raise :class:`PermissionDeniedError` unless the client is an administrator. ``action``: after "may not"."""
        if not self.is_admin(client.uid, client.groups):
            raise PermissionDeniedError(
                f"uid {client.uid} may not {action}: only {self} may; uid {self.own_uid} can allow it: "
                f"`wooly serve --admin-uid {client.uid}`"
            )

    def __str__(self) -> str:
        """Return the administrators, for a sentence."""
        uids = sorted({0, self.own_uid, *self.uids})
        users = f"uid {uids[0]}" if len(uids) == 1 else f"uids {', '.join(map(str, uids))}"
        return users if self.gid is None else f"{users} and members of group {self.gid}"
