"""Messages of a session: greeting, generic replies, pushes, turns and file digests."""

from __future__ import annotations

from shared_store.base.checkpoint import FileId
from shared_store.protocol.messages.envelope import Message, Reply, Request
from shared_store.protocol.messages.identity import Identity


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """First message of a connection. Every protocol version understands it; later ones add fields.

    A store that does not speak this ``protocol`` refuses it (``protocol_version``). The client may greet again, over a
    new connection, with an older one. ``identity`` is the client's description of its process; None from a client that
    does not describe itself.
    """

    protocol: int
    name: str
    version: str
    capabilities: tuple[str, ...] = ()
    identity: Identity | None = None


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """The store's answer to :class:`Hello`, in the same protocol. ``client`` is the client's number in the status."""

    protocol: int
    version: str
    pid: int
    client: int
    capabilities: tuple[str, ...] = ()


class Done(Reply, frozen=True, tag="done"):
    """The request succeeded. ``detail`` is the model's key for requests that accept a prefix of it."""

    detail: str = ""


class Failed(Reply, frozen=True, tag="failed"):
    """The request failed. With ``id`` 0 the store ends the connection.

    ``code`` is that of a class in :mod:`shared_store.base.errors`; ``message`` is for people.
    """

    code: str
    message: str


class Granted(Reply, frozen=True, tag="granted"):
    """The client has the turn, or may publish the model."""


class Push(Message, frozen=True, tag="push"):
    """News from the store, at any time: ``waiting`` (``detail`` names the client that it waits for), ``shutdown``.

    Later versions may add kinds. ``push`` numbers the pushes of a store.
    """

    push: int
    kind: str
    detail: str = ""


class Unsupported(Message, frozen=True, tag="unsupported"):
    """The client does not know the kind of this push. No answer follows."""

    push: int


class Acquire(Request, frozen=True, tag="acquire"):
    """Wait for a turn, in order of request. Answered by :class:`Granted`. The turn ends with the connection.

    With ``wait`` false the reply comes at once: a client that had the turn before the store restarted queues for it and
    continues.
    """

    lease: str
    wait: bool = True


class Yield(Request, frozen=True, tag="yield"):
    """Pass a turn to the next client in the queue. Answered by :class:`Done`."""

    lease: str


class RecallFiles(Request, frozen=True, tag="recall_files"):
    """Look up digests of files. Answered by :class:`FileDigests`."""

    files: tuple[FileId, ...]


class RememberFiles(Request, frozen=True, tag="remember_files"):
    """Report digests of files. Answered by :class:`Done`."""

    files: tuple[tuple[FileId, bytes], ...]


class FileDigests(Reply, frozen=True, tag="file_digests"):
    """One digest for each requested file; empty bytes for an unknown file."""

    digests: tuple[bytes, ...]
