"""What a checkpoint's bytes are, with at most one process of the node reading them to find out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from shared_store.base import digest
from shared_store.base.checkpoint import SETTLED_S, FileId, HashedFile, checkpoint_digest, file_id, hash_files
from shared_store.base.errors import CheckpointError, StoreUnavailableError
from shared_store.client.session import Session


class Checkpoint:
    """A checkpoint's weight files as they are now.

    Names are relative to the checkpoint, so that the same files elsewhere are the same checkpoint.
    """

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        """Note the identity of each file (name in the checkpoint, path). Raises :class:`CheckpointError`."""
        self._names = [name for name, _ in files]
        self._paths = [path for _, path in files]
        self._ids = [file_id(path) for path in self._paths]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(identity.size for identity in self._ids)

    def unchanged(self) -> None:
        """Raise :class:`CheckpointError` if a file is not what it was when this object was made."""
        for path, before in zip(self._paths, self._ids, strict=True):
            if file_id(path) != before:
                raise CheckpointError(f"{path} changed while it was being loaded; load again when it is complete")

    @contextlib.contextmanager
    def digest(
        self, session: Session, *, timeout_s: float, progress: Callable[[int], None] | None = None
    ) -> Iterator[bytes]:
        """The checkpoint's digest, from the store's memory or by hashing the files.

        Of several processes that ask at once, one hashes, and it stays first in line until the block ends: what it
        asks of the store in the block comes before what the others ask. The process that had to read the files is
        so also the one that loads them.

        Args:
            session: connected to the store, which remembers digests of files.
            timeout_s: how long another process may take to hash.
            progress: called with bytes hashed since the last call.

        Raises:
            CheckpointError: a file cannot be read or changes.
            TimedOutError: another process hashes for too long.
        """
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
                    # Told only now: whoever asked meanwhile waits for the lease, and so comes after the block.
                    with contextlib.suppress(StoreUnavailableError):  # the next one who needs it hashes again
                        session.remember_files([(found.file, found.digest) for found in hashed if found.settled])
                return
        yield self._combine(known)

    def _hash(self, known: list[bytes | None], progress: Callable[[int], None] | None) -> list[HashedFile]:
        """Fill in the digests that are missing; returns what was hashed for that."""
        missing = [index for index, found in enumerate(known) if not found]
        _settle([self._ids[index] for index in missing])
        hashed = hash_files([self._paths[index] for index in missing], progress=progress)
        self.unchanged()
        for index, found in zip(missing, hashed, strict=True):
            known[index] = found.digest
        return hashed

    def _combine(self, digests: Sequence[bytes | None]) -> bytes:
        return checkpoint_digest([(name, found) for name, found in zip(self._names, digests, strict=True) if found])


def _settle(files: Sequence[FileId]) -> None:
    """Wait until files written a moment ago are old enough for their digests to be remembered (see ``checkpoint``)."""
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in files) / 1e9
    wait = newest + SETTLED_S - time.time()
    if 0 < wait <= SETTLED_S:
        threading.Event().wait(wait + 0.01)
