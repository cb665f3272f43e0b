"""Staging directories: new content of a directory, written under a hidden name and renamed when it is complete.

A staging directory is locked by the process that fills it. If that process is killed, the directory stays behind
unlocked, and the next save to the same target removes it.

Relies on ``rename(2)`` refusing to replace a directory that is not empty, and on ``flock(2)`` ending with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared_store.runtime.fds import OwnedFd


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a new, locked, hidden directory beside ``target``; rename it to ``target`` when the block ends.

    If the block raises, the directory is removed.

    Raises:
        OSError: the file system refuses, or ``target`` exists and is not an empty directory.
    """
    prefix = f".{target.name}.unfinished-"
    sweep(target.parent, prefix)
    directory, lock = _create(target.parent, prefix)
    with lock:
        try:
            yield directory
            directory.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(directory, ignore_errors=True)  # the next sweep removes the rest


def sweep(parent: Path, prefix: str) -> None:
    """Remove the staging directories in ``parent`` whose processes ended."""
    for found in parent.iterdir():
        if found.name.startswith(prefix) and found.is_dir() and not found.is_symlink():
            lock = _lock(found)
            if lock is not None:
                with lock:
                    shutil.rmtree(found, ignore_errors=True)


def sync(directory: Path) -> None:
    """Write a directory's entries to the disk (``fsync(2)``)."""
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd.fileno())


def _create(parent: Path, prefix: str) -> tuple[Path, OwnedFd]:
    """Make a directory and lock it."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(directory)
        if lock is None:
            continue
        if directory.is_dir():
            return directory, lock
        lock.close()  # another process swept the directory before it was locked


def _lock(directory: Path) -> OwnedFd | None:
    """Lock a directory until the descriptor is closed. Returns None if it was removed or another process locks it."""
    try:
        fd = OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fd.close()
        return None
    return fd
