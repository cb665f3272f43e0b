"""Messages of the command line and of operators: status, models by key, upgrade, shutdown."""

from __future__ import annotations

from shared_store.base.status import Status
from shared_store.protocol.messages.envelope import Reply, Request


class GetStatus(Request, frozen=True, tag="get_status"):
    """Request the store's snapshot. Answered by :class:`StatusReply`."""


class StatusReply(Reply, frozen=True, tag="status"):
    """The store's snapshot."""

    status: Status


class Remove(Request, frozen=True, tag="remove"):
    """Remove an idle model, by an unambiguous prefix of its key. Answered by :class:`Done` with the key."""

    key: str


class Pin(Request, frozen=True, tag="pin"):
    """Pin a model, or unpin it (``pinned`` false), by an unambiguous prefix of its key. Answered as :class:`Remove`."""

    key: str
    pinned: bool


class Quarantine(Request, frozen=True, tag="quarantine"):
    """Report resident blobs of a model that do not match their digests. Their segments get no new readers."""

    key: str
    digests: tuple[bytes, ...]


class Upgrade(Request, frozen=True, tag="upgrade"):
    """Replace the store by another installation's. Only for administrators.

    ``python`` is the path of the installation's interpreter, ``environment`` its ``PYTHON...`` variables. On success
    the connection ends. Otherwise :class:`Failed` has the reason, and the store continues.
    """

    python: str
    environment: dict[str, str]


class Shutdown(Request, frozen=True, tag="shutdown"):
    """Stop the store. Clients keep their mappings."""
