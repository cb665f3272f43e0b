"""The runtime directory and the paths in it, checked before they are trusted.

Who can write to the runtime directory can hand weights to engines, so it must belong to this user, be closed to
others, and not be a link (``lstat``, never ``stat``). A socket's path must fit the kernel's ``sun_path``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared_store.base import envs
from shared_store.base.errors import ConfigError, PathTooLongError, StoreUnavailableError, UnsafePathError

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path, without the final NUL (``unix(7)``)."""


@dataclass(frozen=True)
class RuntimePaths:
    """The files of one store."""

    directory: Path

    @property
    def socket(self) -> Path:
        """Where the store listens."""
        return self.directory / "store.sock"

    @property
    def lock(self) -> Path:
        """Held by ``flock`` for as long as a store runs."""
        return self.directory / "store.lock"

    @property
    def log(self) -> Path:
        """What a detached store prints."""
        return self.directory / "store.log"

    @property
    def journal(self) -> Path:
        """What a keeper writes down of what it holds."""
        return self.directory / "journal"

    @property
    def node_id(self) -> Path:
        """The node's identity where the machine has none of its own."""
        return self.directory / "node-id"


def check_socket_path(path: Path) -> None:
    """Raise :class:`PathTooLongError` when the kernel would refuse the path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise PathTooLongError(
            f"the socket path {path} has {length} bytes, the kernel allows {SOCKET_PATH_LIMIT}; "
            "set WOOLY_RUNTIME_DIR to a shorter directory"
        )


def prepare(directory: Path, *, mode: int = 0o700) -> RuntimePaths:
    """Create the runtime directory if need be, and check it.

    Args:
        directory: the runtime directory; missing parents are created too.
        mode: its permissions. A directory that an earlier store let others enter gets these too.

    Raises:
        UnsafePathError: it is a link, is not a directory, belongs to somebody else, or is open to others.
        PathTooLongError: a socket in it could not be bound.
        ConfigError: it cannot be created.
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
        raise ConfigError(f"cannot write in the runtime directory {directory}; set WOOLY_RUNTIME_DIR to another one")
    return paths


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise :class:`ConfigError` where the block finds the runtime directory full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        raise ConfigError(
            f"cannot write in the runtime directory {directory}: {error.strerror}; make room there, or set "
            "WOOLY_RUNTIME_DIR to another one"
        ) from error


def node_name(file: Path) -> str | None:
    """The node's id in the status and the catalog, kept in a file over restarts; None before a store's first run."""
    try:
        word = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    return f"{socket.gethostname()}-{word}" if word else None


def name_node(file: Path) -> str:
    """The node's id, made up and kept where there is none yet. Raises :class:`ConfigError` when it cannot be kept."""
    known = node_name(file)
    if known is not None:
        return known
    fresh = file.with_suffix(".new")  # a full disk must not leave half a name behind
    with writing(file.parent):
        fresh.write_text(os.urandom(8).hex() + "\n", encoding="ascii")
        fresh.rename(file)
    return f"{socket.gethostname()}-{file.read_text(encoding='ascii').strip()}"


def locate(directory: Path) -> RuntimePaths:
    """The paths of a store to connect to, checked as far as a client can.

    Raises:
        StoreUnavailableError: there is no socket.
        UnsafePathError: the socket belongs to another user than the directory, or is not a socket; or the directory is
            somebody else's, and was not named but is the one that everybody can guess.
        PathTooLongError: no store could listen there.
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
        raise UnsafePathError(f"{paths.directory} is closed to this user; set WOOLY_RUNTIME_DIR to your own") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise UnsafePathError(f"{paths.socket} is not a socket; remove it or set WOOLY_RUNTIME_DIR")
    if found.st_uid != owner.st_uid:
        raise UnsafePathError(
            f"{paths.socket} belongs to uid {found.st_uid}, its directory to uid {owner.st_uid}: not trusted; "
            "set WOOLY_RUNTIME_DIR to a directory of your own"
        )
    if owner.st_uid not in {os.getuid(), 0} and paths.directory == envs.RUNTIME_DIR.parse("").absolute():
        raise UnsafePathError(
            f"{paths.directory}, where this user's store would be, belongs to uid {owner.st_uid}: not trusted; "
            "set WOOLY_RUNTIME_DIR to a directory of your own"
        )
    if stat.S_ISLNK(owner.st_mode) or owner.st_mode & stat.S_IWOTH:
        raise UnsafePathError(f"{paths.directory} is a link or writable by everybody: not trusted")
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


SHARED_MODES = (0o750, 0o701, 0o751)
"""What a store gives its directory when others may connect."""
