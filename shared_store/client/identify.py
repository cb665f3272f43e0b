"""The digest of a checkpoint's files. At most one process of a node reads them to compute it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from shared_store.base import digest
from shared_store.base.checkpoint import (
    SETTLED_S,
    FileId,
    HashedFile,
    checkpoint_digest,
    file_id,
    hash_files,
    why_unrecognized,
)
from shared_store.base.errors import CheckpointError, StoreUnavailableError
from shared_store.client.session import Session

log = logging.getLogger(__name__)


class Checkpoint:
    """The weight files of a checkpoint, as they were when this object was made.

    Names are relative to the checkpoint, so that a copy of the files is the same checkpoint.
    """

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        """Record the identity of each file (size, times, inode).

        Args:
            files: name in the checkpoint, and path.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._names = [name for name, _ in files]
        self._paths = [path for _, path in files]
        self._ids = [file_id(path) for path in self._paths]
        self._unrecognized = next(filter(None, map(why_unrecognized, self._paths)), "")
        self._read: list[bytes] | None = None  # digests of files that are not recognized

    @property
    def nbytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(identity.size for identity in self._ids)

    @property
    def settled(self) -> bool:
        """True if the next change of any file is sure to show in its identity."""
        return not self._unrecognized and all(identity.settled for identity in self._ids)

    def recall(self, session: Session) -> bytes | None:
        """Return the checkpoint digest if the store remembers those of all files, else None."""
        if self._unrecognized:
            return None
        known = session.recall_files(self._ids)
        return self._combine(known) if all(known) else None

    def check_unchanged(self) -> None:
        """Raise :class:`CheckpointError` if a file has changed since this object was made.

        Files that are not recognized by their identity are read again, and compared with the digest.
        """
        for path, before in zip(self._paths, self._ids, strict=True):
            if file_id(path) != before:
                raise _changed(path)
        if self._read is not None:
            for path, before_bytes, now in zip(self._paths, self._read, hash_files(self._paths), strict=True):
                if now.digest != before_bytes:
                    raise _changed(path)

    @contextlib.contextmanager
    def digest(
        self, session: Session, *, timeout_s: float, progress: Callable[[int], None] | None = None
    ) -> Iterator[bytes]:
        """Compute the checkpoint digest, from digests that the store remembers or by hashing the files.

        Files on a file system that does not recognize changes are hashed at every call, also by several processes at
        once. Of several processes that need it at once, one hashes. The others wait until its block ends, so that its
        requests in the block reach the store first: the process that has read the files also loads the model.

        Args:
            session: connected to the store, which remembers digests of files.
            timeout_s: seconds that another process may take to hash.
            progress: called with bytes hashed since the last call.

        Yields:
            The digest, 32 bytes.

        Raises:
            CheckpointError: a file cannot be read or changes.
            TimedOutError: another process did not finish in time.
        """
        if self._unrecognized:
            log.info("wooly: hashing the checkpoint in %s at every load: %s", self._paths[0].parent, self._unrecognized)
            self._read = None
            hashed = hash_files(self._paths, progress=progress)
            self.check_unchanged()
            self._read = [found.digest for found in hashed]
            yield self._combine(self._read)
            return
        known = session.recall_files(self._ids)
        if all(known):
            yield self._combine(known)
            return
        turn = "checkpoint:" + digest.digest(msgspec.msgpack.encode(self._ids)).hex()
        with session.turn(turn, timeout_s):
            known = session.recall_files(self._ids)
            if not all(known):
                hashed = self._hash(known, progress)
                try:
                    yield self._combine(known)
                finally:
                    # Only now: a process that finds the digests remembered does not wait for the turn.
                    with contextlib.suppress(StoreUnavailableError):  # another process hashes again
                        session.remember_files([(found.file, found.digest) for found in hashed if found.settled])
                return
        yield self._combine(known)

    def _hash(self, known: list[bytes | None], progress: Callable[[int], None] | None) -> list[HashedFile]:
        """Hash the files without a digest, fill in ``known``, and return what was hashed."""
        missing = [index for index, found in enumerate(known) if not found]
        _settle([self._ids[index] for index in missing])
        hashed = hash_files([self._paths[index] for index in missing], progress=progress)
        self.check_unchanged()
        for index, found in zip(missing, hashed, strict=True):
            known[index] = found.digest
        return hashed

    def _combine(self, digests: Sequence[bytes | None]) -> bytes:
        return checkpoint_digest([(name, found) for name, found in zip(self._names, digests, strict=True) if found])


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} changed while it was being loaded; load again when it is complete")


def _settle(files: Sequence[FileId]) -> None:
    """Wait until recently written files are old enough for their digests to be remembered (see ``checkpoint``)."""
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in files) / 1e9
    wait = newest + SETTLED_S - time.time()
    if 0 < wait <= SETTLED_S:
        threading.Event().wait(wait + 0.01)
