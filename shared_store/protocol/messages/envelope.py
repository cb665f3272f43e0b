"""Base classes of the messages between clients and the store."""

from __future__ import annotations

import msgspec

VERSION = 1
"""Protocol version. Increased when a message changes in a way that the other side could misunderstand."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base class. A msgpack map whose key ``type`` has the tag of the class."""


class Request(Message, frozen=True):
    """Base class of client messages that get exactly one reply, with the same ``id``. The client chooses the id."""

    id: int


class Reply(Message, frozen=True):
    """Base class of the store's answers. ``id`` is that of the request."""

    id: int
