"""The store's socket: accepts clients, answers their requests one at a time each, and ends in good order."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import assert_never

import shared_store
from shared_store.base.errors import (
    ModelNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ProtocolVersionError,
    TooManyClientsError,
    WoolyError,
)
from shared_store.base.status import Status
from shared_store.protocol import messages, wire
from shared_store.protocol.peers import peer_of
from shared_store.runtime.options import ServeOptions
from shared_store.store.connection import Connection
from shared_store.store.recovery import offers as returns
from shared_store.store.state.records import Attachment, Client
from shared_store.store.store import Store, failure

log = logging.getLogger(__name__)

HELLO_WITHIN_S = 5.0
ACCEPT_AGAIN_S = 0.5


class Server:
    """Serves a store at a listening socket."""

    def __init__(self, store: Store, sock: socket.socket, options: ServeOptions, status: Callable[[], Status]) -> None:
        """``status`` gives the snapshot that clients ask for."""
        self._store = store
        self._sock = sock
        self._options = options
        self._status = status
        self._numbers = itertools.count(1)
        self._pushes = itertools.count(1)
        self._connections: dict[int, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to accept."""
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    async def stop(self) -> None:
        """Tell the clients, and end. What they have mapped stays theirs."""
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        for connection in list(self._connections.values()):
            connection.send(messages.Push(next(self._pushes), "shutdown"))
            connection.close("the store ends")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of fds, most likely: the client stays in the kernel's queue, and is asked in again a little later.
            log.error("cannot accept a client: %s", error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
            return
        sock.setblocking(False)
        peer = peer_of(sock)
        connection = Connection(sock, peer, next(self._numbers))
        allowed = {os.getuid(), *self._options.allow_uids}
        if peer.uid not in allowed and not self._in_group(peer.uid, peer.gid):
            connection.refuse(
                PermissionDeniedError(
                    f"uid {peer.uid} may not use the store of uid {os.getuid()}; its owner can allow it: "
                    f"`wooly serve --allow-uid {peer.uid}`"
                )
            )
            return
        if len(self._connections) >= self._options.max_clients:
            connection.refuse(
                TooManyClientsError(f"the store has its {self._options.max_clients} clients; raise --max-clients")
            )
            return
        self._connections[connection.number] = connection
        connection.start()
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept_again(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _in_group(self, uid: int, gid: int) -> bool:
        if self._options.socket_group is None:
            return False
        import grp
        import pwd

        group = grp.getgrnam(self._options.socket_group)
        try:
            return gid == group.gr_gid or pwd.getpwuid(uid).pw_name in group.gr_mem
        except KeyError:
            return False  # a uid without a name, as containers have them, is in no group by name

    async def _serve(self, connection: Connection) -> None:
        client: Client | None = None
        try:
            client = await self._greet(connection)
            if client is not None:
                self._store.join(client)
                while (frame := await connection.receive()) is not None:
                    await self._answer(connection, client, frame)
        except WoolyError as error:
            connection.refuse(error)
        except Exception:
            log.exception("client %d: a defect of the store; its connection ends", connection.number)
            connection.close("internal error")
        finally:
            connection.close()
            self._store.counts.protocol_errors += connection.refused
            if client is not None:
                self._store.lost(client)
            self._connections.pop(connection.number, None)
            connection.drop_frames()

    async def _greet(self, connection: Connection) -> Client | None:
        try:
            async with asyncio.timeout(HELLO_WITHIN_S):
                frame = await connection.receive()
        except TimeoutError:
            connection.cut(f"no greeting within {HELLO_WITHIN_S:.0f} s")
            return None
        if frame is None:
            return None
        hello = messages.decode_from_client(frame.payload)
        if not isinstance(hello, messages.Hello):
            raise ProtocolError("a connection begins with a greeting")
        if hello.protocol != messages.VERSION:
            raise ProtocolVersionError(
                f"the client (wooly {hello.version}) speaks protocol {hello.protocol}, this store "
                f"(wooly {shared_store.__version__}) speaks {messages.VERSION}; install one version for both, "
                "and restart the store: `wooly stop`"
            )
        connection.greeted()
        connection.name = hello.name[:200]
        connection.send(messages.Welcome(messages.VERSION, shared_store.__version__, os.getpid(), connection.number))
        return Client(
            connection.number,
            connection.peer.pid,
            connection.peer.uid,
            connection.name,
            connection.closed,
            lambda kind, detail: connection.send(messages.Push(next(self._pushes), kind, detail)),
        )

    async def _answer(self, connection: Connection, client: Client, frame: wire.Frame) -> None:
        began = time.monotonic()
        try:
            message = messages.decode_from_client(frame.payload)
            if isinstance(message, messages.Unsupported):
                return
            if isinstance(message, messages.Hello):
                raise ProtocolError("a second greeting")
            if frame.fds and not isinstance(message, messages.Offer):
                raise ProtocolError("fds with a message that has none")
            connection.expect_fds(0)
            try:
                reply, fds = await self._carry_out(client, message, frame.fds.filenos())
            except WoolyError as error:
                self._store.counts.protocol_errors += isinstance(error, ProtocolError)
                reply, fds = failure(error, message.id), ()
                if isinstance(message, messages.Rejoin) and isinstance(error, ModelNotFoundError):
                    connection.expect_fds(len(message.segments))
        finally:
            frame.fds.close()
        self._store.times.add(message, time.monotonic() - began)
        connection.send(reply, fds)

    async def _carry_out(  # noqa: C901, PLR0912 - one arm for each request
        self, client: Client, message: messages.Request, offered: tuple[int, ...]
    ) -> tuple[messages.Reply, tuple[int, ...]]:
        store, number = self._store, message.id
        match message:
            case messages.Open():
                attachment = await store.open(client, message)
                if attachment is None:
                    return messages.Granted(number), ()
                return _attached(number, attachment)
            case messages.Plan():
                return await store.plan(client, message)
            case messages.Fill():
                return messages.Filled(number), (await store.fill(client, message),)
            case messages.Commit():
                return _attached(number, await store.commit(client, message))
            case messages.Acquire():
                await store.acquire(client, message.lease, wait=message.wait)
                return messages.Granted(number), ()
            case messages.RecallFiles():
                return messages.FileDigests(number, store.recall(client, message.files)), ()
            case messages.GetStatus():
                return messages.StatusReply(number, self._status()), ()
            case messages.Remove():
                return messages.Done(number, store.remove(message.key)), ()
            case messages.Pin():
                return messages.Done(number, store.pin(message.key, pinned=message.pinned)), ()
            case messages.Compact():
                return await store.compact(client, message)
            case messages.Compacted():
                return await store.compacted(client, message), ()
            case messages.Quarantine():
                await store.quarantine(client, message)
            case messages.Yield():
                store.give_back(client, message.lease)
            case messages.RememberFiles():
                store.remember(client, message.files)
            case messages.Abandon():
                store.abandon(client, message.key, message.reason)
            case messages.Rejoin():
                returns.rejoin(store, client, message, set(message.segments))
            case messages.Offer():
                await returns.take_offer(store, client, message, offered)
            case messages.Upgrade():
                if client.uid not in {os.getuid(), 0}:
                    raise PermissionDeniedError(f"only uid {os.getuid()} may replace its store")
                await store.keeping.upgrade(message.python, message.environment)
            case messages.Leave():
                store.leave(client, message.key)
            case messages.Report():
                store.report(client, message.key, message.private_bytes)
            case messages.ReportFallback():
                store.fallback(client, message.name, message.reason)
            case messages.Shutdown():
                self.stopping.set()
            case _:
                assert_never(message)  # type: ignore[arg-type]  # Request is open to subclasses; these are all
        return messages.Done(number), ()


def _attached(number: int, attachment: Attachment) -> tuple[messages.Attached, tuple[int, ...]]:
    reply = messages.Attached(number, attachment.manifest, attachment.places, attachment.segments)
    return reply, attachment.fds
