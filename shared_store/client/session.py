"""A connection to the store. It is also the lease: what the store holds for this process ends with it.

One thread reads: it hands replies to the calls that wait for them, and takes the store's pushes. Calls may come from
any thread. A session does not survive a fork: the child gets an error instead of the parent's connection.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import socket
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import shared_store
from shared_store import envs, spawn
from shared_store.checkpoint import FileId
from shared_store.errors import (
    ConnectionLostError,
    ProtocolError,
    StoreUnavailableError,
    TimedOutError,
    WoolyError,
    by_code,
)
from shared_store.manifest import Blob, Manifest, encode
from shared_store.paths import locate
from shared_store.protocol import messages, wire
from shared_store.status import Status

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)

CALL_TIMEOUT_S = 60.0
"""Seconds that an answer may take which waits for nobody else."""

COPY_TIMEOUT_S = 600.0
"""Seconds that an answer may take for which the store allocates or digests much."""


class Session:
    """A connected client of the store."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Greet the store at the other end of a connected socket, and begin to read. See :meth:`connect`."""
        self._channel = wire.BlockingChannel(sock)
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: dict[int, queue.SimpleQueue[tuple[messages.StoreMessage, tuple[int, ...]] | WoolyError]] = {}
        self._ended: WoolyError | None = None
        self._closing = False
        with contextlib.suppress(ConnectionLostError):  # a store that refuses has said why, and does not listen
            self._channel.send(messages.encode(messages.Hello(messages.VERSION, name, shared_store.__version__)))
        try:
            welcome = messages.decode_from_store(self._channel.receive().payload)
        except WoolyError:
            self._channel.close()
            raise
        if isinstance(welcome, messages.Failed):
            self._channel.close()
            raise by_code(welcome.code)(welcome.message)
        if not isinstance(welcome, messages.Welcome):
            self._channel.close()
            raise ProtocolError(f"the store greeted with {type(welcome).__name__}")
        self.store_pid = welcome.pid
        self.client = welcome.client
        sock.settimeout(None)
        # Sending may fail after a while instead of waiting for ever for a store that was stopped.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CALL_TIMEOUT_S), 0))
        self._reader = threading.Thread(target=self._read, name="wooly-session", daemon=True)
        self._reader.start()
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
            return cls(_dial(directory, timeout_s), name)
        except StoreUnavailableError:
            if not start:
                raise
        pid = spawn.start(directory, timeout_s=timeout_s)
        if pid:
            log.info("wooly: started a store (pid %d) in %s", pid, directory)
        return cls(_dial(directory, timeout_s), name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it every lease. Idempotent. Mappings stay valid."""
        self._closing = True
        if self._pid == os.getpid():
            with contextlib.suppress(OSError):  # the store may have closed it first
                self._channel.sock.shutdown(socket.SHUT_RDWR)
            if threading.current_thread() is not self._reader:  # a finalizer may run in any thread
                self._reader.join()
        self._channel.close()

    def _forget(self) -> None:
        """In a forked child: let go of the parent's connection, so that it ends when the parent does."""
        self._channel.sock.close()

    @property
    def alive(self) -> bool:
        """Whether the store is still there."""
        return self._ended is None and not self._closing

    # What a client may ask; the messages tell the meaning.

    @contextlib.contextmanager
    def lease(self, name: str, timeout_s: float) -> Iterator[None]:
        """Hold a named lease. Raises :class:`TimedOutError` when its turn does not come in time."""
        self._call(messages.Acquire(self._next(), name), messages.Granted, timeout_s)
        try:
            yield
        except BaseException:
            with contextlib.suppress(WoolyError):  # the block's own error is the one to tell
                self._call(messages.Yield(self._next(), name), messages.Done)
            raise
        self._call(messages.Yield(self._next(), name), messages.Done)

    def recall_files(self, files: Sequence[FileId]) -> list[bytes | None]:
        """Digests of files, where the store knows them."""
        reply, _ = self._call(messages.RecallFiles(self._next(), tuple(files)), messages.FileDigests)
        return [digest or None for digest in reply.digests]

    def remember_files(self, files: Sequence[tuple[FileId, bytes]]) -> None:
        """Tell the store digests of files."""
        self._call(messages.RememberFiles(self._next(), tuple(files)), messages.Done)

    def open(
        self, key: str, *, name: str, engine: str, device: str, publish: bool, timeout_s: float
    ) -> tuple[messages.Attached, tuple[int, ...]] | None:
        """Ask for a model: its description and the fds of its segments (the caller's), or None: publish it.

        Raises:
            TimedOutError: another client publishes it, and is not done in ``timeout_s``.
            ModelNotFoundError: it is not there, and this client would not publish it.
        """
        request = messages.Open(self._next(), key, name, engine, device, publish)
        reply, fds = self._call(request, (messages.Attached, messages.Granted), timeout_s)
        return (reply, fds) if isinstance(reply, messages.Attached) else None

    def plan(self, key: str, blobs: Sequence[Blob]) -> tuple[messages.Planned, tuple[int, ...]]:
        """Ask where blobs go; the fds of the segments that exist are the caller's.

        Raises:
            OutOfMemoryError: the limit set for the device has no room for them.
        """
        return self._call(messages.Plan(self._next(), key, tuple(blobs)), messages.Planned)

    def fill(self, key: str, segment: int) -> int:
        """Ask for the memory of a promised segment (by its id); the fd is the caller's.

        Raises:
            OutOfMemoryError: the device has no room for it.
        """
        return self._call(messages.Fill(self._next(), key, segment), messages.Filled)[1][0]

    def commit(self, manifest: Manifest) -> tuple[messages.Attached, tuple[int, ...]]:
        """Hand a complete model over, and become its reader; the fds are the caller's."""
        return self._call(messages.Commit(self._next(), manifest.key, encode(manifest)), messages.Attached)

    def abandon(self, key: str, reason: str) -> None:
        """Give up publishing a model."""
        self._call(messages.Abandon(self._next(), key, reason), messages.Done)

    def leave(self, key: str) -> None:
        """Stop reading a model."""
        self._call(messages.Leave(self._next(), key), messages.Done)

    def report(self, key: str, private_bytes: int) -> None:
        """Tell how much of a model this process holds privately."""
        self._call(messages.Report(self._next(), key, private_bytes), messages.Done)

    def report_fallback(self, name: str, reason: str) -> None:
        """Tell that a model was loaded the stock way."""
        self._call(messages.ReportFallback(self._next(), name, reason), messages.Done)

    def status(self) -> Status:
        """The store's snapshot."""
        return self._call(messages.GetStatus(self._next()), messages.StatusReply)[0].status

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

    # Inside.

    def _next(self) -> int:
        return next(self._ids)

    def _call(
        self, request: messages.Request, kind: type[R] | tuple[type[R], ...], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[R, tuple[int, ...]]:
        if self._pid != os.getpid():
            raise StoreUnavailableError("this session belongs to the parent process; connect again after a fork")
        answer: queue.SimpleQueue[tuple[messages.StoreMessage, tuple[int, ...]] | WoolyError] = queue.SimpleQueue()
        with self._lock:
            if self._ended is not None:
                raise type(self._ended)(str(self._ended))  # a new one each time: it would keep its callers' frames
            self._calls[request.id] = answer
            self._channel.send(messages.encode(request))
        try:
            result = answer.get(timeout=timeout_s)
        except queue.Empty:
            self.close()  # the store may still grant what nobody waits for: only the connection's end settles it
            late = answer.get()
            if not isinstance(late, WoolyError):
                wire.close_fds(late[1])
            raise TimedOutError(
                f"the store did not answer `{type(request).__name__.lower()}` within {timeout_s:.0f} s; "
                "`wooly status` shows who is busy"
            ) from None
        if isinstance(result, WoolyError):
            raise type(result)(str(result)) from result
        reply, fds = result
        if isinstance(reply, messages.Failed):
            raise by_code(reply.code)(reply.message)
        if not isinstance(reply, kind):
            wire.close_fds(fds)
            raise ProtocolError(f"the store answered {type(request).__name__} with {type(reply).__name__}")
        return reply, fds

    def _read(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                message = messages.decode_from_store(frame.payload)
                if isinstance(message, messages.Push):
                    self._pushed(message)
                    wire.close_fds(frame.fds)
                elif isinstance(message, messages.Failed) and message.id == 0:
                    raise by_code(message.code)(message.message)
                elif isinstance(message, messages.Reply):
                    with self._lock:
                        answer = self._calls.pop(message.id, None)
                    if answer is None:
                        wire.close_fds(frame.fds)
                    else:
                        answer.put((message, frame.fds))
        except WoolyError as error:
            if not self._closing and not isinstance(error, ConnectionLostError):
                log.error("wooly: the store ended the connection: %s", error)
            with self._lock:
                self._ended = error
                for answer in self._calls.values():
                    answer.put(error)
                self._calls.clear()

    def _pushed(self, push: messages.Push) -> None:
        if push.kind == "waiting":
            log.info("wooly: waiting for %s", push.detail)
        elif push.kind == "shutdown":
            log.warning("wooly: the store ends; what is mapped stays mapped")
        else:
            with self._lock:
                self._channel.send(messages.encode(messages.Unsupported(push.push)))


_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in list(_open_sessions):
        session._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _dial(directory: Path, timeout_s: float) -> socket.socket:
    paths = locate(directory)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(os.fspath(paths.socket))
    except OSError as error:
        sock.close()
        raise StoreUnavailableError(
            f"no store answers at {paths.socket} ({error.strerror or error}); start one with `wooly serve --detach`"
        ) from error
    return sock
