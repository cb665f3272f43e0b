"""A client's session with the store. Its connection is the lease: what the store holds for this process ends with it.

A session outlives its store. When the connection is lost, a session that reads models or holds leases connects again
in the background, to whatever store there is by then, and says what it has: the store of before, restarted, counts it
as a reader again; one that lost the models gets their memory back (:class:`~shared_store.protocol.messages.Offer`).
What can be asked twice is asked again by the call that was cut; publishing cannot.

Calls may come from any thread. A session does not survive a fork: the child gets an error instead of the parent's
connection.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from shared_store.base import envs
from shared_store.base.checkpoint import FileId
from shared_store.base.errors import (
    ConnectionLostError,
    ModelNotFoundError,
    StoreUnavailableError,
    TimedOutError,
    TooManyClientsError,
    WoolyError,
)
from shared_store.base.manifest import Blob, Manifest, encode
from shared_store.base.status import Status
from shared_store.client.link import CALL_TIMEOUT_S, Link
from shared_store.client.retained import Holding
from shared_store.protocol import messages
from shared_store.runtime import spawn
from shared_store.runtime.paths import locate

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)

GREETING_TIMEOUT_S = 60.0
"""Seconds for a store to answer one that comes back: it may be starting."""

OFFER_TIMEOUT_S = 600.0
"""Seconds for a store to digest what it is offered."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.02, 1.0
"""Between two tries to come back, doubling."""

COPY_TIMEOUT_S = 600.0
"""Seconds that an answer may take for which the store allocates or digests much."""


class Session:
    """A client of the store."""

    def __init__(self, directory: Path, name: str, timeout_s: float = 10.0) -> None:
        """Connect to the store of a runtime directory. See :meth:`connect`."""
        self._directory = directory
        self._name = name
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        self._dialled: socket.socket | None = None
        self._held: dict[str, Holding] = {}
        self._leases: dict[str, None] = {}
        with self._connecting:
            self._link = self._dial(timeout_s)
        _open_sessions.add(self)

    @classmethod
    def connect(
        cls,
        runtime_dir: Path | None = None,
        *,
        name: str = "",
        autostart: bool | None = None,
        timeout_s: float = 10.0,
    ) -> Session:
        """Connect to this user's store, starting one if need be.

        Args:
            runtime_dir: where it lives; by default what ``WOOLY_RUNTIME_DIR`` says.
            name: what the status shows for this client.
            autostart: whether to start a store where none answers; by default what ``WOOLY_AUTOSTART`` says.
            timeout_s: for the store to start and to greet.

        Raises:
            StoreUnavailableError: no store answers, and none was or could be started.
            UnsafePathError, PathTooLongError: about the runtime directory.
            PermissionDeniedError, TooManyClientsError, ProtocolVersionError: the store refuses this client.
        """
        directory = runtime_dir or envs.RUNTIME_DIR.get()
        start = envs.AUTOSTART.get() if autostart is None else autostart
        try:
            return cls(directory, name, timeout_s)
        except StoreUnavailableError:
            if not start:
                raise
        pid = spawn.start(directory, timeout_s=timeout_s)
        if pid:
            log.info("wooly: started a store (its keeper is pid %d) in %s", pid, directory)
        return cls(directory, name, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it every lease. Idempotent. Mappings stay valid."""
        self._closed.set()
        if self._pid == os.getpid():
            dialled = self._dialled
            if dialled is not None:
                with contextlib.suppress(OSError):  # it may have ended by itself
                    dialled.shutdown(socket.SHUT_RDWR)
            self._link.close()
        self._held.clear()

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's, so that it ends when the parent does."""
        self._link.forget()
        if self._dialled is not None:
            self._dialled.close()
        self._held.clear()

    @property
    def alive(self) -> bool:
        """Whether the store is there right now."""
        return self._link.alive and not self._closed.is_set()

    @property
    def store_pid(self) -> int:
        """The store's process."""
        return self._link.welcome.pid

    @property
    def store_version(self) -> str:
        """The store's version of wooly."""
        return self._link.welcome.version

    @property
    def client(self) -> int:
        """This client's number in the status."""
        return self._link.welcome.client

    # What a client may ask; the messages tell the meaning.

    @contextlib.contextmanager
    def lease(self, name: str, timeout_s: float) -> Iterator[None]:
        """Hold a named lease. Raises :class:`TimedOutError` when its turn does not come in time.

        Over a restart of the store it is taken again at once; where a client that waited was quicker, both have it.
        """
        self._ask(messages.Acquire(self._next(), name), messages.Granted, timeout_s)
        self._leases[name] = None
        try:
            yield
        except BaseException:
            with contextlib.suppress(WoolyError):  # the block's own error is the one to tell
                self._yield(name)
            raise
        self._yield(name)

    def _yield(self, name: str) -> None:
        self._leases.pop(name, None)
        self._ask(messages.Yield(self._next(), name), messages.Done)

    def recall_files(self, files: Sequence[FileId]) -> list[bytes | None]:
        """Digests of files, where the store knows them."""
        reply, _ = self._ask(messages.RecallFiles(self._next(), tuple(files)), messages.FileDigests)
        return [digest or None for digest in reply.digests]

    def remember_files(self, files: Sequence[tuple[FileId, bytes]]) -> None:
        """Tell the store digests of files."""
        self._ask(messages.RememberFiles(self._next(), tuple(files)), messages.Done)

    def open(
        self, key: str, *, name: str, engine: str, device: str, publish: bool, timeout_s: float
    ) -> tuple[messages.Attached, tuple[int, ...]] | None:
        """Ask for a model: its description and the fds of its segments (the caller's), or None: publish it.

        Raises:
            TimedOutError: another client publishes it, and is not done in ``timeout_s``.
            ModelNotFoundError: it is not there, and this client would not publish it.
        """
        request = messages.Open(self._next(), key, name, engine, device, publish)
        reply, fds = self._ask(request, (messages.Attached, messages.Granted), timeout_s)
        return self._hold(key, reply, fds) if isinstance(reply, messages.Attached) else None

    def plan(
        self,
        key: str,
        blobs: Sequence[Blob],
        *,
        wish: Sequence[messages.BlobPlace] = (),
        sizes: Sequence[int] = (),
    ) -> tuple[messages.Planned, tuple[int, ...]]:
        """Ask where blobs go; the fds of the segments that exist are the caller's.

        ``wish``: where they should, in segments of ``sizes`` bytes; the store may do otherwise.

        Raises:
            OutOfMemoryError: the limit set for the device has no room for them.
        """
        return self._call(messages.Plan(self._next(), key, tuple(blobs), tuple(wish), tuple(sizes)), messages.Planned)

    def fill(self, key: str, segment: int) -> int:
        """Ask for the memory of a promised segment (by its id); the fd is the caller's.

        Raises:
            OutOfMemoryError: the device has no room for it.
        """
        return self._call(messages.Fill(self._next(), key, segment), messages.Filled)[1][0]

    def commit(self, manifest: Manifest) -> tuple[messages.Attached, tuple[int, ...]]:
        """Hand a complete model over, and become its reader; the fds are the caller's."""
        reply, fds = self._call(
            messages.Commit(self._next(), manifest.key, encode(manifest)), messages.Attached, COPY_TIMEOUT_S
        )
        return self._hold(manifest.key, reply, fds)

    def abandon(self, key: str, reason: str) -> None:
        """Give up publishing a model."""
        self._call(messages.Abandon(self._next(), key, reason), messages.Done)

    def leave(self, key: str) -> None:
        """Stop reading a model."""
        self._held.pop(key, None)
        self._ask(messages.Leave(self._next(), key), messages.Done)

    def report(self, key: str, private_bytes: int) -> None:
        """Tell how much of a model this process holds privately."""
        if (held := self._held.get(key)) is not None:
            held.private_bytes = private_bytes
        self._ask(messages.Report(self._next(), key, private_bytes), messages.Done)

    def report_fallback(self, name: str, reason: str) -> None:
        """Tell that a model was loaded the stock way."""
        self._ask(messages.ReportFallback(self._next(), name, reason), messages.Done)

    def status(self) -> Status:
        """The store's snapshot."""
        return self._ask(messages.GetStatus(self._next()), messages.StatusReply)[0].status

    def remove(self, key: str) -> str:
        """Drop a model that nobody uses, by its key or an unambiguous beginning; returns the key."""
        return self._call(messages.Remove(self._next(), key), messages.Done)[0].detail

    def pin(self, key: str, *, pinned: bool) -> str:
        """Keep a model from being evicted, or no longer, by its key or an unambiguous beginning; returns the key."""
        return self._call(messages.Pin(self._next(), key, pinned), messages.Done)[0].detail

    def compact(self, device: str) -> tuple[messages.Compacting, tuple[int, ...]] | None:
        """Ask what to copy so that a device's memory holds the same in less, and for its fds (the caller's).

        None when nothing would be gained.
        """
        reply, fds = self._call(
            messages.Compact(self._next(), device), (messages.Compacting, messages.Done), COPY_TIMEOUT_S
        )
        return (reply, fds) if isinstance(reply, messages.Compacting) else None

    def compacted(self, segment: int) -> messages.Switched:
        """Tell that all is copied into the new segment (by its id), which is unmapped.

        Raises:
            DigestMismatchError: a copy is wrong; everything is as before.
        """
        return self._call(messages.Compacted(self._next(), segment), messages.Switched, COPY_TIMEOUT_S)[0]

    def quarantine(self, key: str, digests: Sequence[bytes]) -> None:
        """Tell that blobs of a model are not what their digests say: their segments go out of service."""
        self._call(messages.Quarantine(self._next(), key, tuple(digests)), messages.Done, COPY_TIMEOUT_S)

    def shutdown_store(self) -> None:
        """Ask the store to end."""
        self._call(messages.Shutdown(self._next()), messages.Done)

    def upgrade_store(self, python: str, environment: dict[str, str]) -> None:
        """Have the store replaced by that of another installation, and connect to it.

        Args:
            python: its interpreter.
            environment: variables that begin with ``PYTHON``, for that interpreter.

        Raises:
            UpgradeError: the store goes on as it was; the message says why.
            PermissionDeniedError: the store is another user's.
        """
        before = self._link
        with contextlib.suppress(ConnectionLostError):  # this store had to go: so it is done
            self._call(messages.Upgrade(self._next(), python, environment), messages.Done)
        self._reconnect(before, GREETING_TIMEOUT_S)

    # Inside.

    def _next(self) -> int:
        return next(self._ids)

    def _hold(
        self, key: str, attached: messages.Attached, fds: tuple[int, ...]
    ) -> tuple[messages.Attached, tuple[int, ...]]:
        """Keep what it takes to give the model back to a store that lost it."""
        self._held[key] = Holding(attached, fds)
        return attached, fds

    def _call(
        self, request: messages.Request, kind: type[R] | tuple[type[R], ...], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[R, tuple[int, ...]]:
        """Ask the store that this session is connected to now."""
        self._check()
        try:
            return self._link.call(request, kind, timeout_s)
        except TimedOutError:
            self.close()
            raise

    def _ask(
        self, request: messages.Request, kind: type[R] | tuple[type[R], ...], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[R, tuple[int, ...]]:
        """Ask what can be asked twice: if the store dies over it, the next one.

        Raises:
            StoreUnavailableError: there is none.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            link = self._link
            try:
                return self._call(request, kind, max(0.0, deadline - time.monotonic()))
            except ConnectionLostError:
                self._check()
            self._reconnect(link, min(GREETING_TIMEOUT_S, max(1.0, deadline - time.monotonic())))

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreUnavailableError("this session belongs to the parent process; connect again after a fork")
        if self._closed.is_set():
            raise ConnectionLostError("this session was closed")

    # Coming back.

    def _dial(self, timeout_s: float) -> Link:
        paths = locate(self._directory)
        sock = self._dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            if self._closed.is_set():
                raise ConnectionLostError("this session was closed")
            sock.connect(os.fspath(paths.socket))
        except OSError as error:
            sock.close()
            raise StoreUnavailableError(
                f"no store answers at {paths.socket} ({error.strerror or error}); start one with `wooly serve --detach`"
            ) from error
        except WoolyError:
            sock.close()
            raise
        return Link(sock, self._name, self._over)

    def _over(self, link: Link) -> None:
        """A connection has ended; called in its thread, which comes back if there is something to come back for."""
        with self._connecting:
            current = link is self._link
        if not current or link.closing or not isinstance(link.ended, ConnectionLostError):
            return
        delay = FIRST_DELAY_S
        while (self._held or self._leases) and not self._closed.is_set():
            try:
                self._reconnect(link, GREETING_TIMEOUT_S)
            except (StoreUnavailableError, TimedOutError, TooManyClientsError):
                self._closed.wait(delay)
                delay = min(LONGEST_DELAY_S, 2 * delay)
            except WoolyError as error:
                log.warning("wooly: the store of now is not for this process, which keeps what it has: %s", error)
                return
            else:
                return

    def _reconnect(self, lost: Link, timeout_s: float) -> None:
        """Be connected again, with all that this session has; ``lost`` is the connection that ended.

        Raises:
            StoreUnavailableError: no store answers.
            WoolyError: it does not want this client.
        """
        with self._connecting:
            if self._link is not lost and self._link.alive:
                return  # another thread was quicker
            link = self._dial(timeout_s)
            try:
                self._restore(link)
            except BaseException:
                link.close()
                raise
            self._link, self._dialled = link, None
            if self._closed.is_set():
                link.close()
                raise ConnectionLostError("this session was closed")
        if self._held:
            log.info("wooly: back with the store (pid %d)", link.welcome.pid)

    def _restore(self, link: Link) -> None:
        for name in list(self._leases):
            link.call(messages.Acquire(self._next(), name, wait=False), messages.Granted)
        for key, held in list(self._held.items()):
            try:
                link.call(held.rejoin(self._next(), key), messages.Done)
            except ModelNotFoundError:
                self._offer(link, key, held)

    def _offer(self, link: Link, key: str, held: Holding) -> None:
        try:
            link.call(held.offer(self._next(), key), messages.Done, OFFER_TIMEOUT_S, held.fds)
        except WoolyError as error:
            if not link.alive:
                raise
            log.warning("wooly: the store does not take model %s back, which stays as it is here: %s", key[:12], error)


_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in list(_open_sessions):
        session.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
