"""Frames with file descriptors over a stream socket.

A frame is a header (payload length, number of fds; both big-endian) and a payload. Fds travel as ``SCM_RIGHTS``, at
most 253 with one ``sendmsg`` (``SCM_MAX_FD``, see ``unix(7)``). A frame with more fds spreads them over its bytes. The
receiver collects fds in order of arrival and gives each frame as many as its header announces.

Relies on: an ordered stream that delivers fds with the bytes that they were sent with, or earlier.

Does not promise: that payloads are messages. :mod:`shared_store.protocol.messages` decodes and checks them.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shared_store.base.errors import MessageTooLargeError, ProtocolError
from shared_store.runtime.fds import OwnedFd, OwnedFds

HEADER = struct.Struct(">IH")
FDS_AT_ONCE = 253
MAX_FDS = 4096
MAX_FROM_STORE = 64 << 20
"""Largest payload in bytes that a client accepts. Manifests of very large models stay far below."""

_CHUNK = 256 << 10


@dataclass(frozen=True)
class Frame:
    """A payload and the fds that came with it. The receiver closes the fds, or detaches them."""

    payload: bytes
    fds: OwnedFds = field(default_factory=OwnedFds)


def header(payload: bytes, fds: int) -> bytes:
    """Return the header of a frame with this payload and this number of fds."""
    return HEADER.pack(len(payload), fds)


class Decoder:
    """Assembles frames from the bytes and fds of single reads. Owns fds until their frame is complete."""

    def __init__(self, limit: int, *, max_fds: int = MAX_FDS) -> None:
        """Accept payloads of at most ``limit`` bytes, and at most ``max_fds`` fds for each frame."""
        self.limit = limit
        self.max_fds = max_fds
        self._data = bytearray()
        self._fds: deque[OwnedFd] = deque()

    @property
    def in_frame(self) -> bool:
        """True after the first byte or fd of an incomplete frame."""
        return bool(self._data or self._fds)

    def feed(self, data: bytes, fds: OwnedFds | None = None) -> list[Frame]:
        """Add the result of one read, and return the frames that are complete now. Takes over the fds.

        Raises:
            MessageTooLargeError: a header announces a payload over the limit.
            ProtocolError: the number of fds is not the announced one, or is over the limit.
        """
        self._data += data
        if fds is not None:
            self._fds.extend(fds.detach())
        if len(self._fds) > self.max_fds:
            raise ProtocolError(f"{len(self._fds)} fds; at most {self.max_fds} are accepted")
        frames: list[Frame] = []
        try:
            self._take(frames)
        except ProtocolError:
            for frame in frames:
                frame.fds.close()
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
            frames.append(Frame(payload, OwnedFds(self._fds.popleft() for _ in range(count))))
        if not self._data and self._fds:
            raise ProtocolError("fds without a message")

    @property
    def rest(self) -> tuple[bytes, tuple[int, ...]]:
        """Return the bytes and the fds of an incomplete frame. The fds are borrowed."""
        return bytes(self._data), tuple(fd.fileno() for fd in self._fds)

    def close(self) -> None:
        """Close the fds of an incomplete frame."""
        while self._fds:
            self._fds.popleft().close()


def receive(sock: socket.socket) -> tuple[bytes, OwnedFds]:
    """Read once. Return the bytes (empty at the end of the stream) and the fds that came with them.

    Raises:
        ProtocolError: the kernel dropped fds because this process reached its limit of open files.
        OSError: as ``recvmsg``.
    """
    space = socket.CMSG_SPACE(FDS_AT_ONCE * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    fds = OwnedFds.from_ints(numbers)
    if flags & socket.MSG_CTRUNC:
        fds.close()
        raise ProtocolError("file descriptors were lost on the way: raise the limit of open files (ulimit -n)")
    return data, fds


def _pieces(payload: bytes, fds: Sequence[OwnedFd]) -> list[tuple[memoryview, Sequence[OwnedFd]]]:
    """Split a frame into the bytes of single ``sendmsg`` calls and the fds that go with the first byte of each."""
    data = memoryview(header(payload, len(fds)) + payload)
    groups = [fds[i : i + FDS_AT_ONCE] for i in range(0, len(fds), FDS_AT_ONCE)] or [fds[:0]]
    # All groups of fds go out before the last byte, so that the frame is never complete without them.
    pieces = [(data[i : i + 1], group) for i, group in enumerate(groups[:-1])]
    return [*pieces, (data[len(pieces) :], groups[-1])]


class _Chunk(NamedTuple):
    """Bytes of a frame, and fds that go with the first of them. ``last``: the frame ends here."""

    data: memoryview
    fds: OwnedFds
    last: bool


def _ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def is_temporary(error: OSError) -> bool:
    """True if a later attempt to send may succeed, although the socket is writable.

    The kernel refuses more fds on the way than the sender may have open (``ETOOMANYREFS``, see ``unix(7)``), and any
    while it has no memory for them.
    """
    return error.errno in {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}


class Outbox:
    """Queue of frames for a non-blocking socket. Owns the fds until they are sent.

    Attributes:
        pending_bytes: bytes that are not sent yet.
        pending_fds: fds that are not sent yet.
    """

    def __init__(self) -> None:
        self._chunks: deque[_Chunk] = deque()
        self._begun = False
        self.pending_bytes = 0
        self.pending_fds = 0

    def put(self, payload: bytes, fds: OwnedFds | None = None) -> None:
        """Queue a frame. Takes over the fds, and closes them once they are sent or by :meth:`close`."""
        owned = [] if fds is None else fds.detach()
        pieces = _pieces(payload, owned)
        for number, (data, group) in enumerate(pieces, 1):
            self._chunks.append(_Chunk(data, OwnedFds(group), number == len(pieces)))
            self.pending_bytes += len(data)
        self.pending_fds += len(owned)

    def send(self, sock: socket.socket) -> bool:
        """Send as much as the socket accepts. Return True when nothing is left to send.

        Raises:
            OSError: the peer has closed the connection; or, if :func:`is_temporary`, the kernel takes no further fds
                now, and the queue is as before.
        """
        while self._chunks:
            chunk = self._chunks[0]
            try:
                sent = sock.sendmsg([chunk.data], _ancillary(chunk.fds.filenos()))
            except BlockingIOError:
                return False
            self.pending_bytes -= sent
            self.pending_fds -= len(chunk.fds)
            chunk.fds.close()
            if sent < len(chunk.data):
                self._chunks[0] = _Chunk(chunk.data[sent:], OwnedFds(), chunk.last)
                self._begun = True
            else:
                self._chunks.popleft()
                self._begun = not chunk.last
        return True

    def send_borrowed(self, sock: socket.socket, payload: bytes, fds: Sequence[int]) -> bool:
        """Send a frame now, after all queued ones, without taking over its fds: at most :data:`FDS_AT_ONCE`.

        Returns:
            True if the socket accepted the frame, of which a part without fds may be queued. False if it accepted
            nothing: offer the frame again later.

        Raises:
            OSError: as :meth:`send`.
        """
        if not self.send(sock):
            return False
        data = memoryview(header(payload, len(fds)) + payload)
        try:
            sent = sock.sendmsg([data], _ancillary(fds))
        except BlockingIOError:
            return False
        if sent < len(data):
            self._chunks.append(_Chunk(data[sent:], OwnedFds(), last=True))
            self._begun = True
            self.pending_bytes += len(data) - sent
        return True

    def drop_waiting(self) -> None:
        """Drop all frames but the one that is being sent, and close their fds."""
        keep: deque[_Chunk] = deque()
        while self._begun and not (keep and keep[-1].last):
            keep.append(self._chunks.popleft())
        begun = self._begun
        self.close()
        self._chunks, self._begun = keep, begun
        self.pending_bytes = sum(len(chunk.data) for chunk in keep)
        self.pending_fds = sum(len(chunk.fds) for chunk in keep)

    def close(self) -> None:
        """Drop all unsent frames, and close their fds."""
        while self._chunks:
            self._chunks.popleft().fds.close()
        self._begun = False
        self.pending_bytes = self.pending_fds = 0
