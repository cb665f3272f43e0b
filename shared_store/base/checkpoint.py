"""The digest of a checkpoint: its weight files' bytes, each hashed once and remembered by its identity on disk.

A file is taken for unchanged while device, inode, size, mtime and ctime (in ns) are the same. The kernel stamps files
with a clock that ticks every few milliseconds, so a file that was changed in the same tick in which it was hashed
could look unchanged: an identity younger than :data:`SETTLED_S` when hashing began is not worth remembering.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from blake3 import blake3

from shared_store.base.errors import CheckpointError

SETTLED_S = 2.0
"""Seconds after a change until a file's identity can be trusted to change with the next one."""

_STEP = 64 << 20
_CONTEXT = "wooly 2026-11 checkpoint digest"


class FileId(msgspec.Struct, frozen=True, array_like=True):
    """What tells a file, and a version of it, from every other on this node (times in ns since the epoch)."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def settled(self) -> bool:
        """Whether a later change is sure to give another identity."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > SETTLED_S * 1e9


class HashedFile(msgspec.Struct, frozen=True, array_like=True):
    """A file's identity and the BLAKE3-256 of its bytes; ``settled``: the pair may be remembered."""

    file: FileId
    digest: bytes
    settled: bool


def file_id(path: Path) -> FileId:
    """The identity of a file now (links are followed: model caches are made of them).

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check the model's path and its permissions"
        ) from error
    return FileId(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def hash_files(
    paths: Sequence[Path], *, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> list[HashedFile]:
    """Hash files in parallel threads, straight from the page cache.

    Args:
        paths: files to read.
        threads: how many at a time; by default one a core, at most 8.
        progress: called with the number of bytes done since the last call, from the hashing threads.

    Raises:
        CheckpointError: a file cannot be read, or changed while it was being read.
    """
    workers = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="wooly-hash") as pool:
        return list(pool.map(lambda path: _hash_file(path, progress), paths))


def _hash_file(path: Path, progress: Callable[[int], None] | None) -> HashedFile:
    before = file_id(path)
    settled = before.settled
    hasher = blake3()
    buffer = bytearray(min(_STEP, max(before.size, 1)))
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(view[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if file_id(path) != before:
        raise CheckpointError(f"{path} changed while it was being read; load again when it is complete")
    return HashedFile(before, hasher.digest(), settled)


def checkpoint_digest(files: Sequence[tuple[str, bytes]]) -> bytes:
    """One digest over (name relative to the checkpoint, digest of its bytes), whatever the order they come in.

    Raises:
        CheckpointError: there are no files.
    """
    if not files:
        raise CheckpointError("the checkpoint has no weight files")
    return blake3(msgspec.msgpack.encode(sorted(files)), derive_key_context=_CONTEXT).digest()
