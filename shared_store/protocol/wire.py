"""Frames with file descriptors, over a stream socket.

A frame is a header (payload length, number of fds; both big-endian) and a payload. Fds travel as SCM_RIGHTS, at most
253 with one ``sendmsg`` (``SCM_MAX_FD``), so a frame with more of them spreads them over its bytes; the receiver
collects fds in order and gives each frame as many as its header says. See ``unix(7)``.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shared_store.base.errors import ConnectionLostError, MessageTooLargeError, ProtocolError

HEADER = struct.Struct(">IH")
FDS_AT_ONCE = 253
MAX_FDS = 4096
MAX_FROM_STORE = 64 << 20
"""Bytes of a payload that a client accepts: manifests of very large models stay far below."""

_CHUNK = 256 << 10


@dataclass(frozen=True)
class Frame:
    """One payload and the fds that came with it, which are the receiver's to close."""

    payload: bytes
    fds: tuple[int, ...] = ()


def close_fds(fds: Sequence[int]) -> None:
    """Close fds that nobody will use."""
    for fd in fds:
        os.close(fd)


def header(payload: bytes, fds: int) -> bytes:
    """The frame's header for a payload and a number of fds."""
    return HEADER.pack(len(payload), fds)


class Decoder:
    """Turns what arrives, in whatever pieces, into frames."""

    def __init__(self, limit: int, *, max_fds: int = MAX_FDS) -> None:
        """Accept payloads of at most ``limit`` bytes and frames of at most ``max_fds`` fds."""
        self.limit = limit
        self.max_fds = max_fds
        self._data = bytearray()
        self._fds: deque[int] = deque()

    @property
    def in_frame(self) -> bool:
        """Whether an incomplete frame has begun."""
        return bool(self._data or self._fds)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Frame]:
        """Take what arrived; return the frames that are complete now.

        Raises:
            MessageTooLargeError: a frame announces more than the limit.
            ProtocolError: more fds arrived than frames announced.
        """
        self._data += data
        self._fds.extend(fds)
        if len(self._fds) > self.max_fds:
            raise ProtocolError(f"{len(self._fds)} fds; at most {self.max_fds} are accepted")
        frames: list[Frame] = []
        try:
            self._take(frames)
        except ProtocolError:
            for frame in frames:
                close_fds(frame.fds)
            raise
        return frames

    def _take(self, frames: list[Frame]) -> None:
        """Append the complete frames, up to the first that is not accepted."""
        while len(self._data) >= HEADER.size:
            length, count = HEADER.unpack_from(self._data)
            if length > self.limit:
                raise MessageTooLargeError(f"a message of {length} bytes; at most {self.limit} are accepted")
            if count > self.max_fds:
                raise ProtocolError(f"a message with {count} fds; at most {self.max_fds} are accepted")
            if len(self._data) < HEADER.size + length:
                break
            if len(self._fds) < count:
                raise ProtocolError(f"a message announced {count} fds and came with {len(self._fds)}")
            payload = bytes(self._data[HEADER.size : HEADER.size + length])
            del self._data[: HEADER.size + length]
            frames.append(Frame(payload, tuple(self._fds.popleft() for _ in range(count))))
        if not self._data and self._fds:
            raise ProtocolError("fds without a message")

    @property
    def rest(self) -> tuple[bytes, tuple[int, ...]]:
        """What has arrived of an incomplete frame, and its fds."""
        return bytes(self._data), tuple(self._fds)

    def close(self) -> None:
        """Close fds of frames that never became complete."""
        while self._fds:
            os.close(self._fds.popleft())


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One read: some bytes (none: the peer is gone) and the fds that came with them.

    Raises:
        ProtocolError: the kernel dropped fds because this process may not open more.
    """
    room = socket.CMSG_SPACE(FDS_AT_ONCE * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        raise ProtocolError("file descriptors were lost on the way: raise the limit of open files (ulimit -n)")
    return data, list(fds)


def _pieces(payload: bytes, fds: Sequence[int]) -> list[tuple[memoryview, tuple[int, ...]]]:
    """A frame as what goes out with one ``sendmsg`` each: bytes, and the fds that come with their first."""
    data = memoryview(header(payload, len(fds)) + payload)
    groups = [tuple(fds[i : i + FDS_AT_ONCE]) for i in range(0, len(fds), FDS_AT_ONCE)] or [()]
    # All groups of fds go out before the last byte, so that the frame is never complete without them.
    pieces = [(data[i : i + 1], group) for i, group in enumerate(groups[:-1])]
    return [*pieces, (data[len(pieces) :], groups[-1])]


def _ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


class Outbox:
    """Frames on their way out of a socket that may not take them at once. Owns the fds until they are sent."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.pending_bytes = 0

    def put(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a frame; its fds are closed once they are sent, or by :meth:`close`."""
        pieces = _pieces(payload, fds)
        self._chunks.extend(pieces)
        self.pending_bytes += sum(len(data) for data, _ in pieces)

    def send(self, sock: socket.socket) -> bool:
        """Send what the socket takes; return whether everything is out. Raises ``OSError`` when the peer is gone."""
        while self._chunks:
            data, fds = self._chunks[0]
            try:
                sent = sock.sendmsg([data], _ancillary(fds))
            except BlockingIOError:
                return False
            close_fds(fds)
            self.pending_bytes -= sent
            if sent < len(data):
                self._chunks[0] = (data[sent:], ())
            else:
                self._chunks.popleft()
        return True

    def close(self) -> None:
        """Drop what was not sent."""
        for _, fds in self._chunks:
            close_fds(fds)
        self._chunks.clear()
        self.pending_bytes = 0


class BlockingChannel:
    """A socket with frames, for a client that waits. Sending and receiving may be done by two threads."""

    def __init__(self, sock: socket.socket, *, limit: int = MAX_FROM_STORE) -> None:
        self.sock = sock
        self._decoder = Decoder(limit)
        self._ready: deque[Frame] = deque()

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame; the fds stay the caller's. Raises :class:`ConnectionLostError`."""
        try:
            for data, group in _pieces(payload, fds):
                sent = self.sock.sendmsg([data], _ancillary(group)) if group else 0
                if rest := data[sent:]:  # sending nothing fails, too, when the peer has gone after a whole message
                    self.sock.sendall(rest)
        except OSError as error:
            raise ConnectionLostError(f"the store is gone: {error.strerror or error}") from error

    def receive(self) -> Frame:
        """Wait for the next frame.

        Raises:
            ConnectionLostError: the store closed the connection, or (``TimeoutError`` as cause) did not answer.
            ProtocolError: what came is not a frame.
        """
        while not self._ready:
            try:
                data, fds = receive(self.sock)
            except OSError as error:
                raise ConnectionLostError(f"the store is gone: {error.strerror or error}") from error
            if not data:
                cut = " in the middle of a message" if self._decoder.in_frame else ""
                raise ConnectionLostError(f"the store closed the connection{cut}")
            self._ready.extend(self._decoder.feed(data, fds))
        return self._ready.popleft()

    def close(self) -> None:
        """Close the socket, and fds that nobody took."""
        self.sock.close()
        self._decoder.close()
        while self._ready:
            close_fds(self._ready.popleft().fds)
