"""Base classes of the messages between clients and the store, and the messages about a request itself.

Both sides send requests. Each side numbers its own, so an id means nothing without its direction.
"""

from __future__ import annotations

import msgspec

VERSION = 2
"""Protocol version. Increased when a message changes in a way that the other side could misunderstand."""

OLDEST = 1
"""Oldest version that this one speaks, too: one request at a time, no cancels, no requests of the store."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base class. A msgpack map whose key ``type`` has the tag of the class."""


class Request(Message, frozen=True):
    """Base class of client messages that get exactly one reply, with the same ``id``. The client chooses the id."""

    id: int


class StoreRequest(Message, frozen=True):
    """Base class of the store's requests, which a client answers once, with the same ``id``. The store chooses the id.

    Answered by ``Done`` or ``Failed``, and before it, if the client likes, by :class:`Accepted` and :class:`Progress`.
    """

    id: int


class Reply(Message, frozen=True):
    """Base class of answers. ``id`` is that of the request."""

    id: int


class Cancel(Message, frozen=True, tag="cancel"):
    """Stop to wait for the answer to the request ``id`` of this side.

    The request is still answered, by ``Failed`` (``cancelled``) where that came in time. Another answer is that of a
    request that was executed: its sender returns what it grants.
    """

    id: int


class Accepted(Message, frozen=True, tag="accepted"):
    """The client carries out the store's request ``id``; its answer follows."""

    id: int


class Progress(Message, frozen=True, tag="progress"):
    """How far the request ``id`` of the other side is: ``done`` of ``total`` units (0: unknown). No answer follows."""

    id: int
    done: int
    total: int = 0
    detail: str = ""
