"""A store in a thread of this process, at a real socket: for tests that control its backend or its state."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from support.client import Client
from support.hostmemory import peek, poke

from shared_store.memory import Access
from shared_store.protocol.messages import capabilities
from shared_store.runtime.claim import listen
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import prepare
from shared_store.store.assembly import Parts
from shared_store.store.clients.access import AccessRules
from shared_store.store.observe.identity import identify
from shared_store.store.observe.loop_times import LoopTimes
from shared_store.store.observe.snapshot import Snapshots
from shared_store.store.server import Server


class ServedStore:
    """Serves a store over a backend, with `options` of `ServeOptions`, until the `with` block ends.

    `events`: kind and fields of each event, in order.
    """

    def __init__(self, directory, backend, limit=None, **options):
        self.paths = prepare(Path(directory))
        self.backend = backend
        self.events = []
        self._options = ServeOptions(self.paths.directory, **options)
        self._limits = {} if limit is None else {backend.device: limit}
        self._clients = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_):
        for client in self._clients:
            client.unmap_all()
            client.close()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.parts = parts = Parts({self.backend.device: self.backend}, self._limits, options=self._options)
        parts.signals.observe(on_event=lambda kind, **fields: self.events.append((kind, fields)))
        options = self._options
        identity = identify(self.paths.directory, self.paths.node_id)
        snapshots = Snapshots(
            parts.state, parts.devices, parts.keeper, parts.times, LoopTimes(), identity, parts.pages, parts.compute
        )

        async def status():
            return snapshots.take(catalog_url="", catalog_state="ok")

        dispatch = parts.dispatch(status, self._stopping)
        server = Server(
            listen(self.paths, options),
            AccessRules.of(options),
            dispatch,
            parts.sessions,
            parts.state.counts,
            capabilities.of_store(arbiter=options.arbiter),
        )
        server.start()
        self._ready.set()
        await self._stopping.wait()
        await server.stop()
        await parts.close()

    def client(self, name="", **options):
        """A client in this process, closed at the end of the block."""
        self._clients.append(Client(self.paths.directory, name, **options))
        return self._clients[-1]

    def call(self, function):
        """Call a function in the store's event loop, which owns the state; return its result."""

        async def run():
            return function()

        return self.run(run())

    def run(self, coroutine):
        """Run a coroutine in the store's event loop; return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def turn_a_bit(self, digest):
        """Flip a bit of a committed blob; the backend must not seal."""
        entry = self.call(lambda: self.parts.state.segments.blobs.at(self.backend.device, digest))
        mapping = self.call(lambda: self.parts.devices.map(entry.segment))
        mapping.map(Access.WRITE)
        address = mapping.address + entry.offset
        poke(address, bytes([peek(address, 1)[0] ^ 1]))
        mapping.close()
