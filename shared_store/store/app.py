"""The store's process: starts the parts of a store, runs them until it is stopped, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from shared_store.base.status import Status
from shared_store.catalog import Catalog, EmbeddedServer
from shared_store.memory import MemfdBackend, backend_for
from shared_store.protocol.durable_state import DurableState
from shared_store.protocol.messages import capabilities
from shared_store.runtime import log_lines
from shared_store.runtime.claim import claim, listen
from shared_store.runtime.fds import raise_file_limit
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import RuntimePaths, prepare
from shared_store.store.assembly import Parts
from shared_store.store.clients.access import AccessRules
from shared_store.store.collector import Collector
from shared_store.store.keeper_link.channel import ControlChannel
from shared_store.store.keeper_link.inheritance import Inheritance, inherit
from shared_store.store.observe.catalog_documents import CatalogDocuments
from shared_store.store.observe.catalog_mirror import Mirror
from shared_store.store.observe.identity import identify
from shared_store.store.observe.loop_times import LoopTimes, TimedLoop
from shared_store.store.observe.snapshot import Snapshots
from shared_store.store.server import Server
from shared_store.store.space.idle_compaction import IdleCompaction

if TYPE_CHECKING:
    from shared_store.store.observe.endpoint import Endpoint

log = logging.getLogger(__name__)

CATALOG_WITHIN_S = 2.0
"""Seconds that the store's own catalog server has to listen, before it counts as unreachable."""


def run(options: ServeOptions, *, ready: Callable[[], None] = lambda: None) -> int:
    """Run a store without a keeper in this process until SIGTERM, SIGINT or a client's shutdown request.

    Args:
        options: its settings.
        ready: called once clients can connect.

    Returns:
        The process's exit code.

    Raises:
        StoreRunningError: a store runs in the runtime directory.
        ConfigError: an option has an unusable value.
    """
    _begin(options)
    paths = prepare(options.runtime_dir, mode=options.directory_mode)
    lock = claim(paths).detach()
    try:
        _run(paths, Inheritance(options, listen(paths, options), lock, DurableState()), None, ready)
    finally:
        os.close(lock)
    return 0


def run_kept(control_fd: int) -> int:
    """Run a store for the keeper at the other end of an inherited socket; otherwise as :func:`run`."""
    os.set_inheritable(control_fd, False)
    channel = ControlChannel(socket.socket(fileno=control_fd))
    inheritance = inherit(channel)
    _begin(inheritance.options)
    paths = RuntimePaths(inheritance.options.runtime_dir)
    _run(paths, inheritance, channel, lambda: None)
    return 0


def _begin(options: ServeOptions) -> None:
    log_lines.configure(options.log_level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    raise_file_limit()


def _run(
    paths: RuntimePaths, inheritance: Inheritance, channel: ControlChannel | None, ready: Callable[[], None]
) -> None:
    times = LoopTimes()
    times.watch_collections()
    with asyncio.Runner(loop_factory=lambda: TimedLoop(times)) as runner:
        runner.run(_serve(paths, inheritance, channel, ready, times))


async def _serve(
    paths: RuntimePaths,
    inheritance: Inheritance,
    channel: ControlChannel | None,
    ready: Callable[[], None],
    times: LoopTimes,
) -> None:
    options = inheritance.options
    access = await asyncio.to_thread(AccessRules.of, options)  # may ask a slow user database
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    parts = Parts({"cpu": MemfdBackend()}, options.max_resident, inheritance=inheritance, channel=channel)
    for device in set(options.max_resident) - set(parts.devices.backends):
        parts.devices.add(backend_for(device))
    identity = identify(paths.directory, paths.node_id)
    embedded = None if options.redis_url else EmbeddedServer(paths.directory)
    catalog = Catalog(options.redis_url or (embedded.url if embedded else ""))
    snapshots = Snapshots(
        parts.state, parts.devices, parts.keeper, parts.times, times, identity, parts.pages, parts.compute
    )
    documents = CatalogDocuments(parts.state, snapshots, identity)

    async def status() -> Status:
        await snapshots.catch_up()
        return snapshots.take(catalog_url=catalog.url, catalog_state=catalog.state)

    address = options.metrics_address
    endpoint = await asyncio.to_thread(_endpoint, address, lambda: _from_thread(loop, status)) if address else None
    dispatch = parts.dispatch(status, stopping)
    server = Server(
        inheritance.listen,
        access,
        dispatch,
        parts.sessions,
        parts.state.counts,
        capabilities.of_store(arbiter=options.arbiter),
    )
    mirror = Mirror(catalog, documents)
    idle_compaction = IdleCompaction(parts.state, parts.devices, parts.host_compaction, options.compact_share)
    parts.signals.observe(mirror.changed, catalog.event)
    collector = Collector()
    parts.signals.observe(idle_compaction.changed, collector.event)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await parts.restore.restore(inheritance.held)
    parts.start()
    try:
        if endpoint is not None:
            endpoint.start()
        server.start()
        parts.keeper.start()
        log.info("ready at %s", paths.socket)
        ready()
        if embedded is not None:
            await asyncio.to_thread(_start_own, embedded)
        await mirror.start()
        collector.settle()
        await stopping.wait()
        log.info("stopping")
    finally:
        mirror.stop()
        await idle_compaction.stop()
        await parts.keeper.stop()
        await server.stop()
        if not inheritance.supervised:  # else the service manager retains it for the next start
            with contextlib.suppress(OSError):  # the directory may have been removed or be read-only
                paths.socket.unlink()
        for part in (endpoint, catalog, embedded):
            if part is not None:
                await asyncio.to_thread(part.stop)
        await parts.close()


def _start_own(server: EmbeddedServer) -> None:
    """Start the catalog's server and wait until it listens, so that its start is not reported as an outage."""
    server.start()
    server.wait(CATALOG_WITHIN_S)


def _endpoint(address: str, status: Callable[[], Status]) -> Endpoint:
    from shared_store.store.observe.endpoint import Endpoint  # its imports take time, and it is off by default

    return Endpoint(address, status)


def _from_thread(loop: asyncio.AbstractEventLoop, status: Callable[[], Coroutine[None, None, Status]]) -> Status:
    """Take the snapshot in the event loop, which owns the state, for a thread that serves metrics."""
    return asyncio.run_coroutine_threadsafe(status(), loop).result(timeout=5.0)
