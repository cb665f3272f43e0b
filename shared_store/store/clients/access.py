"""Admission of clients by the credentials that the kernel reports for them.

Groups are looked up once, when the store starts. Nothing is looked up for a connection: the user database may be slow,
and a group that was deleted meanwhile must not fail in the event loop.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from shared_store.base.errors import ConfigError, PermissionDeniedError, TooManyClientsError, WoolyError
from shared_store.protocol.peers import Peer
from shared_store.runtime.groups import gid_of
from shared_store.runtime.options import ServeOptions
from shared_store.store.roles import Roles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessRules:
    """Who may connect, and who may administer.

    Attributes:
        roles: the administrators, who may connect as well.
        uids: other users who may connect.
        gid: a group whose members may connect.
        max_clients: most connections at a time.
    """

    roles: Roles
    uids: frozenset[int]
    gid: int | None
    max_clients: int

    @staticmethod
    def of(options: ServeOptions) -> AccessRules:
        """Read the options, and look groups up. A group that does not exist admits nobody, with a warning."""
        return AccessRules(
            Roles(frozenset(options.admin_uids), _gid("--admin-group", options.admin_group)),
            frozenset(options.allow_uids),
            _gid("--group", options.socket_group),
            options.max_clients,
        )

    def refusal(self, peer: Peer, connections: int) -> WoolyError | None:
        """Return the error to refuse a new connection with; None if it may connect.

        Args:
            peer: the credentials of its process.
            connections: the number of other connections.
        """
        if not self._admits(peer):
            own = os.getuid()
            return PermissionDeniedError(
                f"uid {peer.uid} may not use the store of uid {own}; its owner can allow it: "
                f"`wooly serve --allow-uid {peer.uid}`"
            )
        if connections >= self.max_clients:
            return TooManyClientsError(f"the store has its {self.max_clients} clients; raise --max-clients")
        return None

    def _admits(self, peer: Peer) -> bool:
        return (
            peer.uid in self.uids
            or (self.gid is not None and self.gid in peer.groups)
            or peer.uid == self.roles.own_uid
            or peer.uid in self.roles.uids
            or (self.roles.gid is not None and self.roles.gid in peer.groups)
        )


def _gid(option: str, group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return gid_of(group)
    except ConfigError as error:  # it existed when `wooly serve` started: this store was restarted later
        log.warning("%s admits nobody: %s", option, error)
        return None
