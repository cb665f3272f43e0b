"""The runtime directory and the paths in it, checked before they are trusted.

A user who can write to the runtime directory can serve weights to engines. So it must belong to this user, be closed to
other users, and not be a link (``lstat``, never ``stat``). A socket's path must fit the kernel's ``sun_path``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConfigError, PathTooLongError, StoreUnavailableError, UnsafePathError

SOCKET_PATH_LIMIT: Final = 107
"""Highest length of a Unix socket's path in bytes, without the final NUL (``unix(7)``)."""

SHARED_MODES: Final = (0o750, 0o701, 0o751)
"""Modes of the runtime directory when other users may connect."""


@dataclass(frozen=True)
class RuntimePaths:
    """The files of one store."""

    directory: Path

    @property
    def socket(self) -> Path:
        """The socket that the store listens on."""
        return self.directory / "store.sock"

    @property
    def lock(self) -> Path:
        """The file that is locked by ``flock`` while a store runs."""
        return self.directory / "store.lock"

    @property
    def log(self) -> Path:
        """The output of a detached store."""
        return self.directory / "store.log"

    @property
    def journal(self) -> Path:
        """The keeper's record of segments and models."""
        return self.directory / "journal"

    @property
    def node_id(self) -> Path:
        """The file with the node's identity (see :mod:`shared_store.runtime.node`)."""
        return self.directory / "node-id"


def check_socket_path(path: Path) -> None:
    """Raise :class:`PathTooLongError` if the path is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise PathTooLongError(
            f"the socket path {path} has {length} bytes, the kernel allows {SOCKET_PATH_LIMIT}; "
            "set WOOLY_RUNTIME_DIR to a shorter directory"
        )


def prepare(directory: Path, *, mode: int = 0o700) -> RuntimePaths:
    """Check the runtime directory, and create it if it is missing.

    Args:
        directory: the runtime directory; missing parents are created too.
        mode: its permissions. A directory with one of :data:`SHARED_MODES` is changed to these.

    Raises:
        UnsafePathError: it is a link, is not a directory, belongs to another user, or is open to others.
        PathTooLongError: the path of a socket in it is too long.
        ConfigError: it cannot be created, or cannot be written to.
    """
    paths = RuntimePaths(directory.absolute())
    check_socket_path(paths.socket)
    try:
        paths.directory.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create the runtime directory {directory}: {error.strerror}; set WOOLY_RUNTIME_DIR"
        ) from error
    _check_directory(paths.directory, owner=os.getuid(), mode=mode)
    if not os.access(paths.directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot write in the runtime directory {directory}; set WOOLY_RUNTIME_DIR to another directory"
        )
    return paths


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise :class:`ConfigError` if the block finds the runtime directory full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        raise ConfigError(
            f"cannot write in the runtime directory {directory}: {error.strerror}; free space on its file system, or "
            "set WOOLY_RUNTIME_DIR to another directory"
        ) from error


def locate(directory: Path) -> RuntimePaths:
    """Return the paths of a store to connect to, checked as far as a client can.

    Raises:
        StoreUnavailableError: there is no socket.
        UnsafePathError: the socket and the directory belong to different users, the path is not a socket, or it is the
            default directory of this user and belongs to another user.
        PathTooLongError: the path is too long for a socket.
    """
    paths = RuntimePaths(directory.absolute())
    check_socket_path(paths.socket)
    try:
        found = paths.socket.lstat()
        owner = paths.directory.lstat()
    except FileNotFoundError as error:
        raise StoreUnavailableError(f"no store at {paths.socket}; start one with `wooly serve --detach`") from error
    except NotADirectoryError as error:
        raise UnsafePathError(f"{paths.directory} is not a directory; set WOOLY_RUNTIME_DIR") from error
    except PermissionError as error:
        raise UnsafePathError(
            f"{paths.directory} is closed to this user; set WOOLY_RUNTIME_DIR to a directory of your own"
        ) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise UnsafePathError(f"{paths.socket} is not a socket; remove it or set WOOLY_RUNTIME_DIR")
    if found.st_uid != owner.st_uid:
        raise UnsafePathError(
            f"{paths.socket} belongs to uid {found.st_uid}, its directory to uid {owner.st_uid}: not trusted; "
            "set WOOLY_RUNTIME_DIR to a directory of your own"
        )
    if owner.st_uid not in {os.getuid(), 0} and paths.directory == envs.RUNTIME_DIR.parse("").absolute():
        raise UnsafePathError(
            f"{paths.directory}, this user's default runtime directory, belongs to uid {owner.st_uid}: not trusted; "
            "set WOOLY_RUNTIME_DIR to a directory of your own"
        )
    if stat.S_ISLNK(owner.st_mode) or owner.st_mode & stat.S_IWOTH:
        raise UnsafePathError(
            f"{paths.directory} is a link or writable by everybody: not trusted; set WOOLY_RUNTIME_DIR to a directory "
            "of your own"
        )
    return paths


def _check_directory(directory: Path, *, owner: int, mode: int) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafePathError(f"{directory} is not a directory (links are not followed); set WOOLY_RUNTIME_DIR")
    if found.st_uid != owner:
        raise UnsafePathError(
            f"{directory} belongs to uid {found.st_uid}, not to uid {owner}; "
            "set WOOLY_RUNTIME_DIR to a directory of your own"
        )
    actual = stat.S_IMODE(found.st_mode)
    if actual == mode:
        return
    if actual in SHARED_MODES:
        with writing(directory):
            directory.chmod(mode)
    elif actual & ~mode:
        raise UnsafePathError(
            f"{directory} has mode {actual:04o}, which lets others in; run: chmod {mode:o} {directory}"
        )
