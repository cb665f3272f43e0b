"""The control channel to the keeper, in the store's event loop. Sending never waits for the keeper."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from shared_store.base.errors import ConnectionLostError, ProtocolError, WoolyError
from shared_store.protocol import keeper_messages, wire
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

AGAIN_S: Final = 0.05
"""Seconds after which a message is sent again that the kernel refused for now."""


class ControlChannel:
    """A channel that blocks until :meth:`attend`, and runs in the event loop from then on."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._sock = sock
        self._decoder = wire.Decoder(wire.MAX_FROM_STORE)
        self._frames: deque[wire.Frame] = deque()
        self._outbox = wire.Outbox()
        self._writing = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._hear: Callable[[keeper_messages.FromKeeper], None] = lambda _: None
        self._over: Callable[[], None] = lambda: None

    def wait_for(self) -> tuple[keeper_messages.FromKeeper, OwnedFds]:
        """Wait for the next message and its descriptors. Raises :class:`ConnectionLostError`."""
        while not self._frames:
            data, fds = wire.receive(self._sock)
            if not data:
                raise ConnectionLostError("the keeper ended while it started this store")
            self._frames.extend(self._decoder.feed(data, fds))
        frame = self._frames.popleft()
        return keeper_messages.decode_from_keeper(frame.payload), frame.fds

    def attend(self, hear: Callable[[keeper_messages.FromKeeper], None], over: Callable[[], None]) -> None:
        """Call ``hear`` with each message, and ``over`` once when the keeper has closed its end."""
        self._hear, self._over = hear, over
        self._sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sock, self._read)
        self._pass_on()

    def send(self, message: keeper_messages.KeeperMessage, fds: OwnedFds | None = None) -> None:
        """Queue a message; take over its descriptors."""
        if self._sock.fileno() < 0:
            if fds is not None:
                fds.close()
            return
        self._outbox.put(keeper_messages.encode(message), fds)
        if self._sock.getblocking():
            self._outbox.send(self._sock)
        else:
            self._write()

    @property
    def behind(self) -> bool:
        """Whether messages wait for the keeper to read."""
        return self._outbox.pending_bytes > 0

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until everything is sent or the channel is closed; return False after the time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Close the channel without calling ``over``. Idempotent."""
        if self._sock.fileno() < 0:
            return
        if not self._sock.getblocking():
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.remove_writer(self._sock)
        self._sock.close()
        self._decoder.close()
        self._outbox.close()
        self._empty.set()
        while self._frames:
            self._frames.popleft().fds.close()

    def _read(self) -> None:
        try:
            data, fds = wire.receive(self._sock)
            self._frames.extend(self._decoder.feed(data, fds))
        except BlockingIOError:
            return
        except (OSError, WoolyError) as error:
            log.error("the connection with the keeper failed: %s", error)
            data = b""
        self._pass_on()
        if not data:
            self.close()
            self._over()

    def _pass_on(self) -> None:
        while self._frames:
            frame = self._frames.popleft()
            frame.fds.close()  # a keeper sends descriptors only before the store serves
            try:
                message = keeper_messages.decode_from_keeper(frame.payload)
            except ProtocolError as error:  # a later version's keeper, during an upgrade
                log.warning("ignoring a message of the keeper that this version does not know: %s", error)
                continue
            self._hear(message)

    def _write(self) -> None:
        if self._sock.fileno() < 0:
            return  # closed since a refusal
        loop = asyncio.get_running_loop()
        done = refused = False
        try:
            done = self._outbox.send(self._sock)
        except OSError as error:
            refused = wire.is_temporary(error)
            if refused:
                loop.call_later(AGAIN_S, self._write)
            else:
                self._outbox.close()  # reading reports the keeper's end, too
                done = True
        writing = not done and not refused  # the socket is writable although the kernel refuses
        if writing and not self._writing:
            loop.add_writer(self._sock, self._write)
        elif not writing and self._writing:
            loop.remove_writer(self._sock)
        self._writing = writing
        if done:
            self._empty.set()
        else:
            self._empty.clear()
