"""The exclusive claim on a runtime directory, and the listening socket in it, for a keeper or a store without one."""

from __future__ import annotations

import fcntl
import os
import socket
import stat

from shared_store.base.errors import ConfigError, StoreRunningError
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.groups import gid_of
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, writing


def claim(paths: RuntimePaths) -> OwnedFd:
    """Lock a runtime directory. The claim ends when the last duplicate of the descriptor is closed.

    Raises:
        StoreRunningError: another store has the directory.
        ConfigError: the directory is full or read-only.
    """
    with writing(paths.directory):
        fd = OwnedFd(os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fd.close()
        raise running(paths) from error
    return fd


def running(paths: RuntimePaths) -> StoreRunningError:
    """Return the error for a runtime directory that has a store."""
    return StoreRunningError(f"a store is already running in {paths.directory}; `wooly status` shows it")


def listen(paths: RuntimePaths, options: ServeOptions) -> socket.socket:
    """Create the listening socket, in place of that of a store which ended. Needs :func:`claim`.

    Raises:
        ConfigError: the path is not a socket, the directory is full or read-only, the group does not exist, or this
            user is not a member of it.
    """
    if options.socket_group is not None:
        _admit_group(paths, options.socket_group)
    paths.directory.chmod(options.directory_mode)  # the directory may be older than the option to share it
    if paths.socket.exists() or paths.socket.is_symlink():
        if not stat.S_ISSOCK(paths.socket.lstat().st_mode):
            raise ConfigError(f"{paths.socket} is in the way and is not a socket; remove it")
        paths.socket.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _bind(sock, paths)
        if options.socket_group is not None:
            os.chown(paths.socket, -1, paths.directory.stat().st_gid)
        paths.socket.chmod(options.socket_mode)
        sock.listen(512)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, paths: RuntimePaths) -> None:
    """Bind the socket for this user alone: `listen` sets the mode when the group is right."""
    before = os.umask(0o177)
    try:
        with writing(paths.directory):
            sock.bind(os.fspath(paths.socket))
    finally:
        os.umask(before)


def _admit_group(paths: RuntimePaths, group: str) -> None:
    gid = gid_of(group)
    try:
        os.chown(paths.directory, -1, gid)
    except PermissionError as error:
        raise ConfigError(
            f"this user is not a member of group {group!r}: only members and root can admit it"
        ) from error
