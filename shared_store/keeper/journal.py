"""The journal: what a keeper holds, in a file, for the keeper after one that was killed.

A header names this boot of the machine; then come records, each a length, a checksum (CRC-32) and a change of the
state as :mod:`shared_store.protocol.control` encodes it. A file that is mostly history is written anew.

Relies on: ``write`` and ``rename`` outliving the process. Nothing is synced, because memory does not outlive the
machine either: the journal of another boot is worth nothing.

Does not promise: that every record arrives. A disk that takes no more makes :attr:`Journal.reason` say so, and the
journal is written anew once it can be.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from shared_store.base.errors import ProtocolError
from shared_store.protocol import control

MAGIC = b"wooly-journal/1\n"
HEAD = struct.Struct(">II")
COMPACT_FROM = 1 << 20
"""Bytes below which a file is left as it is, however much of it is history."""
TRY_AGAIN_S = 5.0

_MAX_RECORD = 64 << 20
_STEP = 1 << 20


def boot_id() -> bytes:
    """What tells this boot of the machine from every other (``random(4)``)."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip() + b"\n"


def record(change: control.StateChange) -> bytes:
    """A change as it lies in the file."""
    payload = control.encode(change)
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def read(path: Path) -> tuple[list[control.StateChange], str]:
    """The changes in a file up to the first that is damaged; why what follows does not count, if anything does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            data = b"".join(iter(lambda: os.read(fd, _STEP), b""))
        finally:
            os.close(fd)
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"it cannot be read: {error.strerror}"
    if not data:
        return [], ""
    head = MAGIC + boot_id()
    if not data.startswith(MAGIC):
        return [], "it is no journal of this version"
    if not data.startswith(head):
        return [], "it is of another boot of this machine"
    changes: list[control.StateChange] = []
    position = len(head)
    for change, end in _records(data, position):
        changes.append(change)
        position = end
    return changes, "" if position == len(data) else f"{len(data) - position} bytes at its end are damaged"


def _records(data: bytes, position: int) -> Iterator[tuple[control.StateChange, int]]:
    while position + HEAD.size <= len(data):
        length, checksum = HEAD.unpack_from(data, position)
        end = position + HEAD.size + length
        payload = data[position + HEAD.size : end]
        if length > _MAX_RECORD or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        try:
            yield control.decode_state(payload), end
        except ProtocolError:
            return
        position = end


class Journal:
    """The file that is written to."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened until the first :meth:`rewrite`."""
        self._path = path
        self._fd: int | None = None
        self._size = 0
        self._whole_size = 0
        self._tried = float("-inf")
        self.reason = ""
        """Why the file is not whole; empty: it is."""

    def append(self, change: control.StateChange) -> None:
        """Write a change. Never raises: see :attr:`reason`."""
        if self._fd is None:
            return
        data = record(change)
        try:
            _write(self._fd, data)
        except OSError as error:
            self._lose(error)
        else:
            self._size += len(data)

    def due(self) -> bool:
        """Whether it should be written anew: it is mostly history, or it is broken and it may be tried again."""
        if self.reason:
            return time.monotonic() >= self._tried + TRY_AGAIN_S
        return self._size > COMPACT_FROM and self._size > 2 * self._whole_size

    def rewrite(self, changes: Iterable[control.StateChange]) -> None:
        """Begin anew with the state as it is. Never raises: see :attr:`reason`."""
        self._tried = time.monotonic()
        beside = self._path.with_name(self._path.name + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(beside, flags, 0o600)
        except OSError as error:
            self._lose(error)
            return
        try:
            size = _write(fd, MAGIC + boot_id())
            for change in changes:
                size += _write(fd, record(change))
            beside.replace(self._path)
        except OSError as error:
            os.close(fd)
            self._lose(error)
            return
        self.close()
        self._fd, self._size, self._whole_size, self.reason = fd, size, size, ""

    def remove(self) -> None:
        """Nothing is held any more: no file either."""
        self.close()
        for path in (self._path, self._path.with_name(self._path.name + ".new")):
            with contextlib.suppress(OSError):  # one that could not be written is not there, or is not ours
                path.unlink()

    def close(self) -> None:
        """Close the file, which stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _lose(self, error: OSError) -> None:
        """What follows would have a gap before it: it is left out until all can be written anew."""
        self.close()
        self._tried = time.monotonic()
        self.reason = f"the journal {self._path} cannot be written: {error.strerror}"


def _write(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
