"""Start a keeper: with the remains of an earlier one, or from a handover."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from shared_store.keeper.keeper import Keeper
from shared_store.keeper.retained_state import RetainedState, recover
from shared_store.keeper.service_manager import ServiceManager
from shared_store.keeper.store_process import StoreProcess
from shared_store.protocol import handover
from shared_store.runtime.claim import claim, listen
from shared_store.runtime.fds import OwnedFd, OwnedFds, raise_file_limit
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, prepare


def run(options: ServeOptions, *, ready: Callable[[], None] = lambda: None) -> int:
    """Run a keeper and its stores until SIGTERM, SIGINT, or the requested stop of a store.

    Args:
        options: settings of the stores.
        ready: called once clients are served.

    Returns:
        The exit code of the process.

    Raises:
        StoreRunningError: the runtime directory has a store.
        ConfigError: an option cannot be used.
    """
    paths = _prepare(options)
    manager = ServiceManager()
    lock = claim(paths)
    try:
        state, sock, events = recover(paths, manager)
        sock = sock or listen(paths, options)
    except BaseException:
        lock.close()
        raise
    retained = RetainedState(state, paths, manager)
    keeper = Keeper(paths, options, lock=lock, listen=sock, retained=retained, manager=manager, ready=ready)
    for kind, detail in events:
        keeper.notice(kind, detail)
    return keeper.run()


def take_over(memfd: OwnedFd) -> int:
    """Continue from an earlier keeper, or from a store whose keeper died. Return the exit code of the process.

    Raises:
        ProtocolError: ``memfd`` is not a handover.
    """
    given = handover.take(memfd)
    options = ServeOptions.from_json(given.options)
    paths, manager = _prepare(options), ServiceManager()
    keeper = Keeper(
        paths,
        options,
        lock=OwnedFd(given.lock),
        listen=socket.socket(fileno=given.listen),
        retained=RetainedState(given.state(), paths, manager),
        manager=manager,
        ready=lambda: None,
    )
    store = StoreProcess(
        given.store_pid,
        OwnedFd(given.store),
        socket.socket(fileno=given.control),
        unread=given.unread,
        unread_fds=OwnedFds.from_ints(given.unread_fds),
        ready=True,
    )
    keeper.adopt(store, given.restarts, upgrade=given.upgrade)
    return keeper.run()


def _prepare(options: ServeOptions) -> RuntimePaths:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    return prepare(options.runtime_dir, mode=options.directory_mode)
