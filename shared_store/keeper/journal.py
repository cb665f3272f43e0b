"""The journal: the keeper's state in a file, for the next keeper after one that was killed.

A header names this boot of the machine. Records follow, each with a length, a CRC-32 checksum, and a state change as
:mod:`shared_store.protocol.keeper_messages` encodes it. A file that is mostly history is rewritten.

Relies on: ``write`` and ``rename`` outliving the process. Nothing is synced, because the segments do not outlive the
machine either: a journal of another boot is useless.

Does not promise: that every record is written. When a write fails, :attr:`Journal.reason` says why, and the whole file
is rewritten once that is possible.
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
from shared_store.protocol import keeper_messages
from shared_store.runtime.fds import OwnedFd

MAGIC = b"wooly-journal/1\n"
HEAD = struct.Struct(">II")
COMPACT_FROM = 1 << 20
"""Size in bytes up to which a file is not rewritten, however much of it is history."""
TRY_AGAIN_S = 5.0

_MAX_RECORD = 64 << 20
_STEP = 1 << 20


def boot_id() -> bytes:
    """Return the id of this boot of the machine (``random(4)``)."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip() + b"\n"


def record(change: keeper_messages.StateChange) -> bytes:
    """Return a change in the form of the file."""
    payload = keeper_messages.encode(change)
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def read(path: Path) -> tuple[list[keeper_messages.StateChange], str]:
    """Read the changes up to the first damaged record.

    Returns:
        The changes, and why the file or the rest of it was ignored (empty: it is complete, or does not exist).
    """
    try:
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd:
            data = b"".join(iter(lambda: os.read(fd.fileno(), _STEP), b""))
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"cannot be read: {error.strerror}"
    if not data:
        return [], ""
    head = MAGIC + boot_id()
    if not data.startswith(MAGIC):
        return [], "not a journal of this version"
    if not data.startswith(head):
        return [], "written before this machine was rebooted"
    changes: list[keeper_messages.StateChange] = []
    position = len(head)
    for change, end in _records(data, position):
        changes.append(change)
        position = end
    return changes, "" if position == len(data) else f"the last {len(data) - position} bytes are damaged"


def _records(data: bytes, position: int) -> Iterator[tuple[keeper_messages.StateChange, int]]:
    """Yield each valid record and the position of its end."""
    while position + HEAD.size <= len(data):
        length, checksum = HEAD.unpack_from(data, position)
        end = position + HEAD.size + length
        payload = data[position + HEAD.size : end]
        if length > _MAX_RECORD or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        try:
            yield keeper_messages.decode_state(payload), end
        except ProtocolError:
            return
        position = end


class Journal:
    """The writer of a journal."""

    def __init__(self, path: Path) -> None:
        """Open nothing until the first :meth:`rewrite`."""
        self._path = path
        self._fd: OwnedFd | None = None
        self._size = 0
        self._rewritten_size = 0
        self._tried = float("-inf")
        self.reason = ""
        """Why the file is incomplete; empty: it is complete."""

    def append(self, change: keeper_messages.StateChange) -> None:
        """Write a change. Does not raise: see :attr:`reason`."""
        if self._fd is None:
            return
        data = record(change)
        try:
            _write(self._fd, data)
        except OSError as error:
            self._fail(error)
        else:
            self._size += len(data)

    def due(self) -> bool:
        """True if the file should be rewritten: it is mostly history, or a failed write can be tried again."""
        if self.reason:
            return time.monotonic() >= self._tried + TRY_AGAIN_S
        return self._size > COMPACT_FROM and self._size > 2 * self._rewritten_size

    def rewrite(self, changes: Iterable[keeper_messages.StateChange]) -> None:
        """Replace the file by one with the current state. Does not raise: see :attr:`reason`."""
        self._tried = time.monotonic()
        replacement = self._path.with_name(self._path.name + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = OwnedFd(os.open(replacement, flags, 0o600))
        except OSError as error:
            self._fail(error)
            return
        try:
            size = _write(fd, MAGIC + boot_id())
            for change in changes:
                size += _write(fd, record(change))
            replacement.replace(self._path)
        except OSError as error:
            fd.close()
            self._fail(error)
            return
        self.close()
        self._fd, self._size, self._rewritten_size, self.reason = fd, size, size, ""

    def remove(self) -> None:
        """Close and delete the file: the state is gone in good order."""
        self.close()
        for path in (self._path, self._path.with_name(self._path.name + ".new")):
            with contextlib.suppress(OSError):  # a file that could not be written is absent, or not this user's
                path.unlink()

    def close(self) -> None:
        """Close the file. It remains on disk."""
        if self._fd is not None:
            self._fd.close()
            self._fd = None

    def _fail(self, error: OSError) -> None:
        """Stop appending: a record after a gap would be misread. The next :meth:`rewrite` starts over."""
        self.close()
        self._tried = time.monotonic()
        self.reason = f"cannot write the journal {self._path}: {error.strerror}"


def _write(fd: OwnedFd, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd.fileno(), view) :]
    return len(data)
