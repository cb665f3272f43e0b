"""A client's session with the store: one method for each request.

Everything that the store grants to a session ends with it: the connection is the lease. A session outlives the store,
see :mod:`shared_store.client.connection`. Requests that have the same effect when they are sent twice are repeated if
the store restarts; those of a publication are not, they raise
:class:`~shared_store.base.errors.ConnectionLostError`.

A request that is not answered in time raises :class:`~shared_store.base.errors.TimedOutError`, and is cancelled. The
session goes on, and returns what the store granted meanwhile.

Methods may be called from any thread, and raise :class:`~shared_store.base.errors.WoolyError` in one of its classes.
Descriptors in a result are owned by the caller, see :mod:`shared_store.runtime.fds`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from shared_store.activity.writer import ActivityWriter
from shared_store.base import envs
from shared_store.base.checkpoint import FileId
from shared_store.base.errors import (
    ConnectionLostError,
    ProtocolError,
    StoreUnavailableError,
    WoolyError,
)
from shared_store.base.manifest import Blob, Manifest, encode
from shared_store.base.status import Status
from shared_store.base.text import one_line
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.activity import attach_page
from shared_store.client.connection import Connection
from shared_store.client.link import CALL_TIMEOUT_S
from shared_store.client.retained import RetainedModel
from shared_store.client.serving import Handler, Hearing
from shared_store.client.sleeping import COPY_TIMEOUT_S, Sleeping
from shared_store.client.workload import describe
from shared_store.client.workloads import Workloads
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import MAX_NAME, Identity
from shared_store.runtime import spawn
from shared_store.runtime.fds import OwnedFd, OwnedFds

log = logging.getLogger(__name__)
R = TypeVar("R", bound=messages.Reply)
S = TypeVar("S", bound=messages.StoreRequest)


class Session:
    """A client of the store."""

    def __init__(self, directory: Path, name: str, timeout_s: float = 10.0, identity: Identity | None = None) -> None:
        """Connect to the store of a runtime directory. See :meth:`connect`."""
        self._connection = Connection(directory, name, timeout_s, identity)
        self.workloads = Workloads(self._connection)
        """Requests about workloads."""
        self.sleeping = Sleeping(self._connection)
        """Requests of a reader that sleeps."""

    @classmethod
    def connect(
        cls,
        runtime_dir: Path | None = None,
        *,
        name: str = "",
        autostart: bool | None = None,
        timeout_s: float = 10.0,
        kind: str = "other",
        gpus: Sequence[str] = (),
        workload: WorkloadSettings | None = None,
        identity: Identity | None = None,
    ) -> Session:
        """Connect to this user's store, and start one if none answers.

        Args:
            runtime_dir: the store's directory; None is the default of ``WOOLY_RUNTIME_DIR``.
            name: shown for this client in the status.
            autostart: start a store if none answers; None is the default of ``WOOLY_AUTOSTART``.
            timeout_s: seconds for the store to start and to greet.
            kind: of this client, see :mod:`shared_store.protocol.messages.identity`.
            gpus: the store's names of the devices that this process uses.
            workload: settings of the workload of this process; None: as the environment says.
            identity: of this process, instead of its kind, GPUs and settings.

        Raises:
            ConfigError: an environment variable has an invalid value.
            StoreUnavailableError: no store answers, and none was or could be started.
            UnsafePathError, PathTooLongError: the runtime directory cannot be used.
            PermissionDeniedError, TooManyClientsError, ProtocolVersionError: the store refuses this client.
        """
        directory = runtime_dir or envs.RUNTIME_DIR.get()
        start = envs.AUTOSTART.get() if autostart is None else autostart
        identity = identity or describe(kind, gpus, workload)
        name = one_line(name, MAX_NAME)  # a greeting has at most 4 KiB
        try:
            return cls(directory, name, timeout_s, identity)
        except StoreUnavailableError:
            if not start:
                raise
        pid = spawn.start(directory, timeout_s=timeout_s)
        if pid:
            log.info("wooly: started a store (keeper pid %d) in %s", pid, directory)
        return cls(directory, name, timeout_s, identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and everything that the store granted over it. Idempotent. Mappings stay valid."""
        self._connection.close()

    @property
    def alive(self) -> bool:
        """True while the store is connected."""
        return self._connection.alive

    @property
    def store_pid(self) -> int:
        """The store's process id."""
        return self._connection.link.welcome.pid

    @property
    def store_version(self) -> str:
        """The store's version of wooly."""
        return self._connection.link.welcome.version

    @property
    def client(self) -> int:
        """This client's number in the status."""
        return self._connection.link.welcome.client

    def supports(self, capability: str) -> bool:
        """Whether the connected store announced a capability, see :mod:`shared_store.protocol.messages.capabilities`.

        A restarted store may differ.
        """
        return capability in self._connection.link.capabilities

    def serve(self, kind: type[S], handler: Handler[S]) -> None:
        """Carry out requests of the store of a kind, from here on and over later connections, too.

        Args:
            kind: the class of the request, for example :class:`~shared_store.protocol.messages.SwapOut`.
            handler: called in a thread of its own with the request and its
                :class:`~shared_store.client.serving.StoreCall`. Returns a detail for the answer, or None. Raises
                :class:`~shared_store.base.errors.DeclinedError` with the reason to decline.
        """
        self._connection.handlers.add(kind, handler)

    def hear(self, kind: str, hearing: Hearing) -> None:
        """Call a function with the detail of each push of a kind, from here on and over later connections, too.

        Args:
            kind: for example ``room``.
            hearing: called in the thread that reads: it must not block, or call the store.
        """
        self._connection.handlers.hear(kind, hearing)

    # Turns and digests of files.

    @contextlib.contextmanager
    def turn(self, name: str, timeout_s: float) -> Iterator[None]:
        """Take a turn: a named mutex, granted in order of request, for the block.

        After a restart of the store the turn is taken again at once. If another client was faster, both have it.

        Args:
            name: for example ``start:`` and a device.
            timeout_s: seconds to wait for it.

        Raises:
            TimedOutError: it was not granted in time.
        """
        self._call(messages.Acquire(self._next(), name), messages.Granted, timeout_s)
        self._connection.turns[name] = None
        try:
            yield
        except BaseException:
            with contextlib.suppress(WoolyError):  # the block's own error is more important
                self._end_turn(name)
            raise
        self._end_turn(name)

    def _end_turn(self, name: str) -> None:
        self._connection.turns.pop(name, None)
        self._call(messages.Yield(self._next(), name), messages.Done)

    def report_activity(self, writer: ActivityWriter) -> None:
        """Have a writer write to this client's activity page, which the store reads for its status.

        Without effect while no store is connected, and for a store that has no such pages. A store that this session
        rejoins shows the activity again.
        """
        self._connection.activity = writer
        attach_page(self._connection.link, self._next(), writer)

    def recall_files(self, files: Sequence[FileId]) -> list[bytes | None]:
        """Return the digests of files; None for a file that the store does not know."""
        reply = self._call(messages.RecallFiles(self._next(), tuple(files)), messages.FileDigests)
        return [digest or None for digest in reply.digests]

    def remember_files(self, files: Sequence[tuple[FileId, bytes]]) -> None:
        """Store the digests of files."""
        self._call(messages.RememberFiles(self._next(), tuple(files)), messages.Done)

    # Models.

    def open(
        self, key: str, *, name: str, engine: str, device: str, publish: bool, timeout_s: float
    ) -> tuple[messages.Attached, OwnedFds] | None:
        """Attach to a model, or be granted its publication.

        Args:
            key: the weight key.
            name: the model's name.
            engine: the engine's name and version.
            device: the store's name of the device.
            publish: accept the publication if the store does not have the model.
            timeout_s: seconds that another client may take to publish it.

        Returns:
            The store's description of the model and a descriptor of each segment; None if the publication was granted.

        Raises:
            TimedOutError: another client publishes the model, and did not commit in time.
            ModelNotFoundError: the store does not have the model, and ``publish`` is False.
        """
        request = messages.Open(self._next(), key, name, engine, device, publish)
        reply, fds = self._connection.call(request, (messages.Attached, messages.Granted), timeout_s, repeat=True)
        if isinstance(reply, messages.Attached):
            return self._retain(key, reply, fds)
        fds.close()
        return None

    def plan(
        self,
        key: str,
        blobs: Sequence[Blob],
        *,
        wish: Sequence[messages.BlobPlace] = (),
        sizes: Sequence[int] = (),
        whole: bool = False,
    ) -> tuple[messages.Planned, OwnedFds]:
        """Ask for a layout of the blobs of a model that this session publishes.

        Args:
            key: the weight key.
            blobs: in the manifest's order.
            wish: preferred segment and offset of each blob, because clients have mapped it there. A hint.
            sizes: bytes of the segments that ``wish`` numbers.
            whole: the caller writes the rest of the plan, too.

        Returns:
            The layout, and a descriptor of each segment that exists already. With ``whole``, descriptors of the host
            copies follow that the rest is to be read from.

        Raises:
            OutOfMemoryError: the blobs do not fit under the device's limit.
        """
        request = messages.Plan(self._next(), key, tuple(blobs), tuple(wish), tuple(sizes), whole)
        return self._connection.call(request, messages.Planned, COPY_TIMEOUT_S, repeat=False)

    def fill(self, key: str, segment: int) -> OwnedFd:
        """Have a planned segment (by its id) allocated, and return its descriptor.

        Raises:
            OutOfMemoryError: the device is full.
        """
        _, fds = self._connection.call(messages.Fill(self._next(), key, segment), messages.Filled, repeat=False)
        with fds:
            if len(fds) != 1:
                raise ProtocolError(f"the store answered Fill with {len(fds)} descriptors")
            return fds.detach()[0]

    def commit(self, manifest: Manifest) -> tuple[messages.Attached, OwnedFds]:
        """Commit a published model, and become its reader. Returns what :meth:`open` does for a reader."""
        request = messages.Commit(self._next(), manifest.key, encode(manifest))
        reply, fds = self._connection.call(request, messages.Attached, COPY_TIMEOUT_S, repeat=False)
        return self._retain(manifest.key, reply, fds)

    def abandon(self, key: str, reason: str) -> None:
        """Abort a publication."""
        self._call(messages.Abandon(self._next(), key, reason), messages.Done, repeat=False)

    def leave(self, key: str) -> None:
        """Stop to be a reader of a model."""
        self._connection.retained.pop(key, None)
        self._call(messages.Leave(self._next(), key), messages.Done)

    def report(self, key: str, private_bytes: int) -> None:
        """Report how many bytes of a model this process has in private memory."""
        if (model := self._connection.retained.get(key)) is not None:
            model.private_bytes = private_bytes
        self._call(messages.Report(self._next(), key, private_bytes), messages.Done)

    def report_fallback(self, name: str, reason: str) -> None:
        """Count a model that was loaded the stock way."""
        self._call(messages.ReportFallback(self._next(), name, reason), messages.Done)

    def quarantine(self, key: str, digests: Sequence[bytes]) -> None:
        """Report blobs of a model whose bytes do not match their digests: their segments are quarantined."""
        request = messages.Quarantine(self._next(), key, tuple(digests))
        self._call(request, messages.Done, COPY_TIMEOUT_S, repeat=False)

    # Compaction.

    def compact(self, device: str) -> tuple[messages.Compacting, OwnedFds] | None:
        """Ask for the next step of a device's compaction.

        Returns:
            The blobs to copy, with descriptors of the target and the source segments; None if nothing would be freed.
        """
        request = messages.Compact(self._next(), device)
        reply, fds = self._connection.call(request, (messages.Compacting, messages.Done), COPY_TIMEOUT_S, repeat=False)
        if isinstance(reply, messages.Compacting):
            return reply, fds
        fds.close()
        return None

    def compacted(self, segment: int) -> messages.Switched:
        """Report that all blobs were copied to the target segment (by its id), which is unmapped again.

        Raises:
            DigestMismatchError: a copy does not match. Nothing was changed.
        """
        request = messages.Compacted(self._next(), segment)
        return self._call(request, messages.Switched, COPY_TIMEOUT_S, repeat=False)

    # Administration.

    def status(self) -> Status:
        """Return the store's snapshot."""
        return self._call(messages.GetStatus(self._next()), messages.StatusReply).status

    def remove(self, key: str) -> str:
        """Remove a model without readers, by its key or an unambiguous prefix; return the key."""
        return self._call(messages.Remove(self._next(), key), messages.Done, repeat=False).detail

    def pin(self, key: str, *, pinned: bool) -> str:
        """Pin or unpin a model, by its key or an unambiguous prefix; return the key."""
        return self._call(messages.Pin(self._next(), key, pinned), messages.Done, repeat=False).detail

    def shutdown_store(self) -> None:
        """Shut down the store."""
        self._call(messages.Shutdown(self._next()), messages.Done, repeat=False)

    def upgrade_store(self, python: str, environment: dict[str, str]) -> None:
        """Have the store replaced by another installation's, and connect to that.

        Args:
            python: the installation's interpreter.
            environment: variables that begin with ``PYTHON``, for that interpreter.

        Raises:
            UpgradeError: the store was not replaced; the message gives the reason.
            PermissionDeniedError: the store is another user's.
        """
        before = self._connection.link
        with contextlib.suppress(ConnectionLostError):  # the old store ends when the new one takes over
            self._call(messages.Upgrade(self._next(), python, environment), messages.Done, repeat=False)
        self._connection.reconnect(before)

    # Inside.

    def _next(self) -> int:
        return self._connection.next_id()

    def _retain(self, key: str, attached: messages.Attached, fds: OwnedFds) -> tuple[messages.Attached, OwnedFds]:
        """Retain a model, to rejoin a restarted store with it."""
        try:
            self._connection.retained[key] = RetainedModel(attached, fds)
        except BaseException:
            fds.close()
            raise
        return attached, fds

    def _call(
        self,
        request: messages.Request,
        kind: type[R] | tuple[type[R], ...],
        timeout_s: float = CALL_TIMEOUT_S,
        *,
        repeat: bool = True,
    ) -> R:
        """Make a call whose answer has no descriptors."""
        reply, fds = self._connection.call(request, kind, timeout_s, repeat=repeat)
        fds.close()
        return reply
