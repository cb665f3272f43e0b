"""A keeper's process: finds what is left of an earlier one, and runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

from shared_store.keeper import journal
from shared_store.keeper.child import StoreProcess
from shared_store.keeper.keeper import LISTEN, SEGMENT, Keeper
from shared_store.keeper.notify import ServiceManager, handed_back
from shared_store.protocol import handover
from shared_store.protocol.durable_state import Holdings
from shared_store.runtime.claim import claim, listen, raise_file_limit
from shared_store.runtime.fds import OwnedFds
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, prepare


def run(options: ServeOptions, *, ready: Callable[[], None] = lambda: None) -> int:
    """Keep a store in this process until SIGTERM, SIGINT, or a store that was told to end.

    Args:
        options: the store's settings.
        ready: called once clients are served.

    Returns:
        The process's exit code.

    Raises:
        StoreRunningError: the runtime directory has a store.
        ConfigError: something in the options cannot be used.
    """
    paths = _begin(options)
    manager = ServiceManager()
    lock = claim(paths)
    try:
        held, sock, told = _recall(paths, manager)
        sock = sock or listen(paths, options)
    except BaseException:
        os.close(lock)
        raise
    keeper = Keeper(paths, options, lock=lock, listen=sock, held=held, manager=manager, ready=ready)
    for kind, detail in told:
        keeper.notice(kind, detail)
    return keeper.run()


def take_over(handover_fd: int) -> int:
    """Go on where an earlier keeper, or a store without one, left off. Returns the process's exit code.

    Raises:
        ProtocolError: ``handover_fd`` is no handover.
    """
    given = handover.take(handover_fd)
    options = ServeOptions.from_json(given.options)
    keeper = Keeper(
        _begin(options),
        options,
        lock=given.lock,
        listen=socket.socket(fileno=given.listen),
        held=given.holdings(),
        manager=ServiceManager(),
        ready=lambda: None,
    )
    store = StoreProcess(
        given.store_pid,
        given.store,
        socket.socket(fileno=given.control),
        unread=given.unread,
        unread_fds=OwnedFds.from_ints(given.unread_fds),
        ready=True,
    )
    keeper.adopt(store, given.restarts, upgrade=given.upgrade)
    return keeper.run()


def _begin(options: ServeOptions) -> RuntimePaths:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    return prepare(options.runtime_dir, mode=options.directory_mode)


def _recall(
    paths: RuntimePaths, manager: ServiceManager
) -> tuple[Holdings, socket.socket | None, list[tuple[str, str]]]:
    """What the journal says, with the fds that a service manager kept; and what was wrong with either."""
    changes, damage = journal.read(paths.journal)
    told = [("journal_damaged", f"{paths.journal}: {damage}")] if damage else []
    held = Holdings()
    for change in changes:
        held.apply(change)
    listening = None
    for name, fd in handed_back():
        number = name.removeprefix(SEGMENT)
        if name == LISTEN and paths.socket.exists():
            listening = socket.socket(fileno=fd)
        elif name.startswith(SEGMENT) and number.isdigit() and (found := held.segments.get(int(number))):
            found.fd = fd
        else:
            os.close(fd)
            manager.drop(name)
            if name != LISTEN:
                told.append(("segment_dropped", f"the journal does not know {name}, which the service manager kept"))
    return held, listening, told
