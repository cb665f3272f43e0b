"""The claim on a runtime directory, and the socket in it: the same for a keeper and for a store without one."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import stat

from shared_store.base.errors import ConfigError, StoreRunningError
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, writing


def claim(paths: RuntimePaths) -> int:
    """Become the one store of a runtime directory; the returned fd holds the claim until it is closed.

    Raises:
        StoreRunningError: another store has it.
    """
    with writing(paths.directory):
        fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreRunningError(f"a store runs already in {paths.directory}; `wooly status` shows it") from error
    return fd


def listen(paths: RuntimePaths, options: ServeOptions) -> socket.socket:
    """A listening socket for those who may connect, in place of a dead store's. Needs :func:`claim`.

    Raises:
        ConfigError: the path is taken by something else, or the group does not exist or is not this user's to give.
    """
    if options.socket_group is not None:
        _give_to_group(paths, options.socket_group)
    paths.directory.chmod(options.directory_mode)  # it may be older than the wish to share it
    if paths.socket.exists() or paths.socket.is_symlink():
        if not stat.S_ISSOCK(paths.socket.lstat().st_mode):
            raise ConfigError(f"{paths.socket} is in the way and is not a socket; remove it")
        paths.socket.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        with writing(paths.directory):
            sock.bind(os.fspath(paths.socket))
    finally:
        os.umask(before)
    if options.socket_group is not None:
        os.chown(paths.socket, -1, paths.directory.stat().st_gid)
    paths.socket.chmod(options.socket_mode)
    sock.listen(512)
    return sock


def _give_to_group(paths: RuntimePaths, group: str) -> None:
    import grp

    try:
        os.chown(paths.directory, -1, grp.getgrnam(group).gr_gid)
    except KeyError as error:
        raise ConfigError(f"there is no group {group!r}") from error
    except PermissionError as error:
        raise ConfigError(f"only members of group {group!r} (and root) can let it in") from error


def raise_file_limit() -> None:
    """A segment or a client is an fd each: take as many as the system lets this user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
