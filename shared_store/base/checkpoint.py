"""The digest of a checkpoint: over the bytes of its weight files, each hashed once and cached by its identity on disk.

Relies on the file system: a file counts as unchanged while its device, inode, size, mtime and ctime (in ns) are equal.
Where that is not sure (:mod:`shared_store.base.file_systems`), a digest is not cached.
The kernel's timestamps advance in ticks of a few milliseconds, so a file that is changed in the tick in which it was
hashed could look unchanged. An identity that was younger than :data:`SETTLED_S` when hashing began is not cached.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from blake3 import blake3

from shared_store.base import file_systems
from shared_store.base.errors import CheckpointError

SETTLED_S = 2.0
"""Age in seconds from which the next change of a file is sure to change its identity."""

_MAX_THREADS = 4  # more read no faster from the page cache, and slow a load beside them
_STEP = 8 << 20  # hashed while it is in the processor's cache, and few turns of the interpreter's lock
_CONTEXT = "wooly 2026-11 checkpoint digest"


class FileId(msgspec.Struct, frozen=True, array_like=True):
    """Identity of a file and its version on this node. Times are in ns since the epoch."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def settled(self) -> bool:
        """True if the next change is sure to change the identity."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > SETTLED_S * 1e9


class HashedFile(msgspec.Struct, frozen=True, array_like=True):
    """A file's identity and the BLAKE3-256 of its bytes. ``settled``: the pair may be cached."""

    file: FileId
    digest: bytes
    settled: bool


def file_id(path: Path) -> FileId:
    """Return the current identity of a file. Links are followed, because model caches consist of them.

    Opens a file on a network file system, which asks its server for the current times only then.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        found = _opened(path) if file_systems.has_server(path) else path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return FileId(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _opened(path: Path) -> os.stat_result:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.fstat(opened)
    finally:
        os.close(opened)


def why_unrecognized(path: Path) -> str:
    """Return why a file's identity does not tell its bytes; empty if it does, so that the digest may be cached.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return file_systems.why_unrecognized(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {error.strerror}; check the model's path and permissions")


def hash_files(
    paths: Sequence[Path], *, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> list[HashedFile]:
    """Hash files in parallel threads.

    Args:
        paths: files to read.
        threads: number of threads; by default one for each core, at most 4. They share the files, and divide a file
            where there are more of them than files.
        progress: called from the hashing threads with the bytes done since the last call.

    Raises:
        CheckpointError: a file cannot be read, or changed while it was being read.
    """
    workers = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    each = max(1, workers // max(1, len(paths)))
    with ThreadPoolExecutor(workers, thread_name_prefix="wooly-hash") as pool:
        return list(pool.map(lambda path: _hash_file(path, each, progress), paths))


def _hash_file(path: Path, threads: int, progress: Callable[[int], None] | None) -> HashedFile:
    before = file_id(path)
    settled = before.settled and not why_unrecognized(path)
    hasher = blake3(max_threads=threads)
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
    """Return one digest over files, independent of their order.

    Args:
        files: name relative to the checkpoint, and digest of the bytes, of each file.

    Raises:
        CheckpointError: there are no files.
    """
    if not files:
        raise CheckpointError("the checkpoint has no weight files")
    return blake3(msgspec.msgpack.encode(sorted(files)), derive_key_context=_CONTEXT).digest()
