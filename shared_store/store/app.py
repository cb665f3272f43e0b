"""The store's process: puts the parts together and runs them until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from shared_store.base.status import Status
from shared_store.catalog import Catalog, EmbeddedServer
from shared_store.memory import MemfdBackend, backend_for
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.claim import claim, listen
from shared_store.runtime.fds import raise_file_limit
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, prepare
from shared_store.store.keeper_link.channel import ControlChannel
from shared_store.store.keeper_link.link import Inheritance, Keeping, inherit
from shared_store.store.observe.catalog_mirror import Mirror
from shared_store.store.observe.snapshot import identify, take_catalog, take_status
from shared_store.store.recovery.grace import GRACE_S
from shared_store.store.recovery.offers import end_grace, restore
from shared_store.store.server import Server
from shared_store.store.space.idle_compaction import Tidier
from shared_store.store.store import Store

if TYPE_CHECKING:
    from shared_store.store.observe.endpoint import Endpoint

log = logging.getLogger(__name__)

CATALOG_WITHIN_S = 2.0
"""Seconds for the store's own catalog server to listen, before it counts as away."""


def run(options: ServeOptions, *, ready: Callable[[], None] = lambda: None) -> int:
    """Run a store without a keeper in this process until SIGTERM, SIGINT or a client's shutdown request.

    Args:
        options: its settings.
        ready: called once clients can connect.

    Returns:
        The process's exit code.

    Raises:
        StoreRunningError: the runtime directory has a store.
        ConfigError: something in the options cannot be used.
    """
    _begin(options)
    paths = prepare(options.runtime_dir, mode=options.directory_mode)
    lock = claim(paths).detach()
    try:
        asyncio.run(_serve(paths, Inheritance(options, listen(paths, options), lock, DurableState()), None, ready))
    finally:
        os.close(lock)
    return 0


def run_kept(control_fd: int) -> int:
    """Run a store for the keeper at the other end of an inherited socket. As :func:`run` otherwise."""
    os.set_inheritable(control_fd, False)
    channel = ControlChannel(socket.socket(fileno=control_fd))
    inheritance = inherit(channel)
    _begin(inheritance.options)
    paths = RuntimePaths(inheritance.options.runtime_dir)
    asyncio.run(_serve(paths, inheritance, channel, lambda: None))
    return 0


def _begin(options: ServeOptions) -> None:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    raise_file_limit()


async def _serve(
    paths: RuntimePaths, inheritance: Inheritance, channel: ControlChannel | None, ready: Callable[[], None]
) -> None:
    options = inheritance.options
    keeping = Keeping(inheritance, channel)
    loop = asyncio.get_running_loop()
    store = Store({"cpu": MemfdBackend()}, options.max_resident, keeping=keeping)
    for device in set(options.max_resident) - set(store.segments.backends):
        store.segments.add_device(backend_for(device))
    identity = identify(paths.directory, paths.node_id)
    embedded = None if options.redis_url else EmbeddedServer(paths.directory)
    catalog = Catalog(options.redis_url or (embedded.url if embedded else ""))

    def status() -> Status:
        state: Literal["ok", "down"] = catalog.state
        return take_status(store, identity, catalog_url=catalog.url, catalog_state=state)

    address = options.metrics_address
    endpoint = _endpoint(address, lambda: _from_thread(loop, status)) if address else None
    server = Server(store, inheritance.listen, options, status)
    mirror = Mirror(catalog, lambda: take_catalog(store, identity))
    tidier = Tidier(store, options.compact_share)

    def changed() -> None:
        mirror.changed()
        tidier.changed()

    store.changed, store.event = changed, catalog.event
    keeping.event = catalog.event
    restore(store, inheritance.held)
    loop.call_later(GRACE_S, end_grace, store)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopping.set)
    try:
        if endpoint is not None:
            endpoint.start()
        server.start()
        keeping.start()
        log.info("ready at %s", paths.socket)
        ready()
        if embedded is not None:
            await asyncio.to_thread(_start_own, embedded)
        catalog.start(take_catalog(store, identity))
        await server.stopping.wait()
        log.info("stopping")
    finally:
        mirror.stop()
        await tidier.stop()
        await keeping.stop()
        await server.stop()
        if not inheritance.supervised:  # a service manager keeps it for the next start
            with contextlib.suppress(OSError):  # its directory may be gone by now, or read-only
                paths.socket.unlink()
        if endpoint is not None:
            await asyncio.to_thread(endpoint.stop)
        await asyncio.to_thread(catalog.stop)
        if embedded is not None:
            await asyncio.to_thread(embedded.stop)
        store.segments.close()


def _start_own(server: EmbeddedServer) -> None:
    """Start the catalog's server, and let it begin to listen: one that only starts was not lost, and is not back."""
    server.start()
    server.wait(CATALOG_WITHIN_S)


def _endpoint(address: str, status: Callable[[], Status]) -> Endpoint:
    from shared_store.store.observe.endpoint import Endpoint  # what it imports costs time, and it is off by default

    return Endpoint(address, status)


def _from_thread(loop: asyncio.AbstractEventLoop, status: Callable[[], Status]) -> Status:
    """Take the snapshot in the loop, which owns the state, for a thread that serves metrics."""

    async def take() -> Status:
        return status()

    return asyncio.run_coroutine_threadsafe(take(), loop).result(timeout=5.0)
