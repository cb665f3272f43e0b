"""The cache directory: saved models by weight key, up to a number of bytes, evicted least recently used first.

An entry is a directory with a saved model. It appears and disappears as a whole (it is renamed to a hidden name before
it is removed), so readers need no lock. Its modification time is the time of its last use. Writers exclude each other
with a lock on a file in the directory, which ends with the process.

The directory must belong to this user and must not be writable by other users: a user who can write to it can describe
other weights under any key.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from shared_store.base import envs
from shared_store.base.errors import ConfigError, DiskError, UnsafePathError
from shared_store.disk.description import DESCRIPTION
from shared_store.disk.staging import sweep
from shared_store.runtime.fds import OwnedFd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A saved model in the cache; ``used_ns`` is the time of its last use in nanoseconds since the epoch."""

    key: str
    used_ns: int
    nbytes: int


@dataclass(frozen=True)
class Cache:
    """A cache directory, and the most bytes that its entries may have."""

    directory: Path
    max_bytes: int

    def path(self, key: str) -> Path:
        """Return the path of a model's entry, which may not exist."""
        return self.directory / key

    def find(self, key: str) -> Path | None:
        """Return the path of a model's entry, or None if there is none."""
        path = self.path(key)
        return path if (path / DESCRIPTION).exists() else None

    def touch(self, key: str) -> None:
        """Record that an entry is in use now. Does nothing if it was removed or the directory is read-only."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key))

    def remove(self, key: str) -> None:
        """Remove an entry. Processes that opened its files can still read them. A failure is logged."""
        hidden = self.directory / f".{key}.unfinished-{os.getpid()}"
        try:
            self.path(key).rename(hidden)
        except FileNotFoundError:
            return  # another process removed it
        except OSError as error:
            log.warning("wooly: cannot remove %s: %s", self.path(key), error.strerror)
            return
        shutil.rmtree(hidden, ignore_errors=True)  # the next writer sweeps the rest

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other writers while the block runs. Waits for the lock, then removes leftovers of killed processes.

        Raises:
            DiskError: the directory cannot be written to.
        """
        try:
            lock = OwnedFd(
                os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            )
        except OSError as error:
            raise DiskError(f"cannot write to the cache directory {self.directory}: {error.strerror}") from error
        with lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            sweep(self.directory, ".")
            yield

    def evict(self, nbytes: int) -> list[str]:
        """Remove entries, least recently used first, until ``nbytes`` bytes fit. Returns the removed keys.

        Raises:
            DiskError: ``nbytes`` exceeds the limit of the cache. Nothing is removed.
        """
        if nbytes > self.max_bytes:
            raise DiskError(
                f"{nbytes} bytes exceed WOOLY_CACHE_MAX_BYTES ({self.max_bytes}); raise it to cache this model"
            )
        entries = sorted(self._entries(), key=attrgetter("used_ns"))
        used = sum(entry.nbytes for entry in entries)
        removed = []
        for entry in entries:
            if used + nbytes <= self.max_bytes:
                break
            self.remove(entry.key)
            used -= entry.nbytes
            removed.append(entry.key)
        return removed

    def _entries(self) -> Iterator[Entry]:
        for path in self.directory.iterdir():
            if not path.name.startswith(".") and (path / DESCRIPTION).exists():
                nbytes = sum(file.stat().st_size for file in path.iterdir())
                yield Entry(path.name, path.stat().st_mtime_ns, nbytes)


def configured() -> Cache | None:
    """Return the cache that ``WOOLY_CACHE_DIR`` names, creating the directory if needed; None if it is not set.

    Raises:
        ConfigError: the directory cannot be created, or a variable is malformed.
        UnsafePathError: it is a link, belongs to another user, or is writable by other users.
    """
    directory = envs.CACHE_DIR.get()
    if directory is None:
        return None
    max_bytes = envs.CACHE_MAX_BYTES.get()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(f"WOOLY_CACHE_DIR={directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafePathError(
            f"WOOLY_CACHE_DIR={directory} must be a directory (not a link), belong to uid {os.getuid()}, and not be "
            "writable by other users: its files are loaded as weights"
        )
    return Cache(directory, max_bytes)


def available() -> Cache | None:
    """Return the configured cache, or None if there is none or it cannot be used; the latter is logged."""
    try:
        return configured()
    except ConfigError as error:
        log.warning("wooly: not using the cache: %s", error)
        return None
