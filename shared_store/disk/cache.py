"""The cache directory: saved models by their weight keys, up to a number of bytes; the least recently used leave first.

An entry is a directory that ``wooly save`` could have made. It appears whole and goes whole (renamed aside before it is
removed), so readers need no lock; its modification time is when it was last used. Whoever adds to the directory has its
turn, by a lock on a file in it that ends with the process.

The directory must be this user's and closed to other users' writing: who can write there can describe a model under any
key.
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
from pathlib import Path

from shared_store.base import envs
from shared_store.base.errors import ConfigError, DiskError, UnsafePathError
from shared_store.disk.save import sweep
from shared_store.disk.saved import DESCRIPTION

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A cache directory, and most that its entries may take (bytes)."""

    directory: Path
    max_bytes: int

    def entry(self, key: str) -> Path:
        """Where a model is, or would be."""
        return self.directory / key

    def find(self, key: str) -> Path | None:
        """The entry of a model, if there is one."""
        entry = self.entry(key)
        return entry if (entry / DESCRIPTION).exists() else None

    def used(self, key: str) -> None:
        """An entry was of use now."""
        with contextlib.suppress(OSError):  # it left, or the directory cannot be written to
            os.utime(self.entry(key))

    def discard(self, key: str) -> None:
        """Remove an entry. Who has its files open can read on."""
        aside = self.directory / f".{key}.unfinished-{os.getpid()}"
        try:
            self.entry(key).rename(aside)
        except FileNotFoundError:
            return  # somebody else did
        except OSError as error:
            log.warning("wooly: cannot remove %s: %s", self.entry(key), error.strerror)
            return
        shutil.rmtree(aside, ignore_errors=True)  # what stays is swept by the next one who adds

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait to be the one who adds; in the block nobody else does. Leftovers of the dead are removed first.

        Raises:
            DiskError: the directory cannot be written to.
        """
        try:
            fd = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise DiskError(f"cannot write in the cache directory {self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            sweep(self.directory, ".")
            yield
        finally:
            os.close(fd)

    def make_room(self, nbytes: int) -> list[str]:
        """Remove entries, least recently used first, until so many bytes may be added; returns their keys.

        Raises:
            DiskError: it is more than the cache may have at all. Nothing was removed.
        """
        if nbytes > self.max_bytes:
            raise DiskError(f"{nbytes} bytes are more than WOOLY_CACHE_MAX_BYTES allows ({self.max_bytes}); raise it")
        entries = sorted(self._entries(), key=lambda found: found[1])
        left = sum(size for _, _, size in entries)
        removed = []
        for key, _, size in entries:
            if left + nbytes <= self.max_bytes:
                break
            self.discard(key)
            left -= size
            removed.append(key)
        return removed

    def _entries(self) -> Iterator[tuple[str, int, int]]:
        """Key, time of last use (ns) and bytes of each entry."""
        for path in self.directory.iterdir():
            if not path.name.startswith(".") and (path / DESCRIPTION).exists():
                size = sum(file.stat().st_size for file in path.iterdir())
                yield path.name, path.stat().st_mtime_ns, size


def configured() -> Cache | None:
    """The cache that the environment names, made if need be; None where it names none.

    Raises:
        ConfigError: it cannot be made, or a variable cannot be used.
        UnsafePathError: it is a link or somebody else's, or others can write to it.
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
            f"WOOLY_CACHE_DIR={directory} must be a directory (no link) that belongs to uid {os.getuid()} and that "
            "nobody else can write to: what is in it is loaded as weights"
        )
    return Cache(directory, max_bytes)
