"""The store's listening socket: accepts and greets clients, and serves each in an exchange of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket

import shared_store
from shared_store.base.errors import (
    ProtocolError,
    ProtocolVersionError,
    WoolyError,
)
from shared_store.base.text import one_line
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import MAX_NAME, Identity
from shared_store.protocol.peers import peer_of
from shared_store.store.clients.access import AccessRules
from shared_store.store.clients.process_watch import ProcessWatch
from shared_store.store.clients.sessions import Sessions
from shared_store.store.connection import Connection
from shared_store.store.dispatch import Dispatch
from shared_store.store.exchange import Exchange
from shared_store.store.session import Session
from shared_store.store.state.clients import Client
from shared_store.store.state.counts import Counts

log = logging.getLogger(__name__)

HELLO_WITHIN_S = 5.0
"""Seconds that a client has to greet after it connected."""

ACCEPT_AGAIN_S = 0.5
"""Seconds until the next attempt to accept, after one failed."""


class Server:
    """Serves clients at a listening socket."""

    def __init__(
        self,
        sock: socket.socket,
        access: AccessRules,
        dispatch: Dispatch,
        sessions: Sessions,
        counts: Counts,
        announced: tuple[str, ...],
    ) -> None:
        """Take over a listening socket. :meth:`start` begins to accept. ``announced``: the store's capabilities."""
        self._sock = sock
        self._access = access
        self._dispatch = dispatch
        self._sessions = sessions
        self._counts = counts
        self._announced = announced
        self._numbers = itertools.count(1)
        self._pushes = itertools.count(1)
        self._connections: dict[int, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to accept clients."""
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    async def stop(self) -> None:
        """Push the shutdown to all clients, and close their connections. Clients keep their mappings."""
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
            # Most likely out of descriptors. The client waits in the kernel's queue until the next attempt.
            log.error("cannot accept a client: %s", error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
            return
        sock.setblocking(False)
        connection = Connection(sock, peer_of(sock), next(self._numbers))
        refusal = self._access.refusal(connection.peer, len(self._connections))
        if refusal is not None:
            connection.refuse(refusal)
            return
        self._connections[connection.number] = connection
        connection.start()
        watch = ProcessWatch(sock, lambda: connection.cut("its process ended, but another one has its socket"))
        task = asyncio.get_running_loop().create_task(self._serve(connection, watch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept_again(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    async def _serve(self, connection: Connection, watch: ProcessWatch) -> None:
        """Serve a connection until it ends."""
        exchange: Exchange | None = None
        try:
            exchange = await self._greet(connection)
            if exchange is not None:
                self._sessions.begin(exchange.session)
                exchange.begin()
                await connection.closed.wait()
        except WoolyError as error:
            connection.refuse(error)
        except Exception:
            log.exception("internal error; closing the connection of client %d", connection.number)
            connection.close("internal error")
        finally:
            watch.close()
            connection.close()
            if connection.refused:
                self._counts.add("protocol_errors")
            if exchange is not None:
                await exchange.ended()
                self._sessions.end(exchange.session)
            self._connections.pop(connection.number, None)
            connection.ended()

    async def _greet(self, connection: Connection) -> Exchange | None:
        """Receive and answer the greeting; return None if the connection ended before."""
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
        if not messages.OLDEST <= hello.protocol <= messages.VERSION:
            raise ProtocolVersionError(
                f"the client (wooly {one_line(hello.version, MAX_NAME)}) speaks protocol {hello.protocol}, this store "
                f"(wooly {shared_store.__version__}) speaks {messages.OLDEST} to {messages.VERSION}; install one "
                "version for both, and restart the store: `wooly stop`"
            )
        connection.greeted()
        connection.send(self._welcome(connection.number, hello.protocol))
        session = self._session(connection, hello)
        return Exchange(connection, session, self._dispatch, protocol=hello.protocol)

    def _welcome(self, client: int, protocol: int) -> messages.Welcome:
        announced = self._announced if protocol > 1 else ()
        return messages.Welcome(protocol, shared_store.__version__, os.getpid(), client, announced)

    def _session(self, connection: Connection, hello: messages.Hello) -> Session:
        peer = connection.peer
        return Session(
            Client(
                connection.number,
                peer.pid,
                peer.uid,
                one_line(hello.name, MAX_NAME),
                peer.groups,
                (hello.identity or Identity()).cleaned(),
            ),
            connection.closed,
            lambda kind, detail: connection.send(messages.Push(next(self._pushes), kind, detail)),
            self._access.roles,
            capabilities=frozenset(hello.capabilities),
        )
