"""A store in a thread of this process, at a real socket: for what its backend must do, such as hold wrong bytes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from support.client import Client
from support.hostmemory import peek, poke

from shared_store.memory import Access
from shared_store.runtime.claim import listen
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import prepare
from shared_store.store.observe.snapshot import identify, take_status
from shared_store.store.server import Server
from shared_store.store.state.digest_check import mapping_of
from shared_store.store.store import Store


class ServedStore:
    """Serves a store over a backend until the `with` block ends. `events` are what it told, in order."""

    def __init__(self, directory, backend, limit=None):
        self.paths = prepare(Path(directory))
        self.backend = backend
        self.events = []
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
        self._loop.call_soon_threadsafe(self._server.stopping.set)
        self._thread.join()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self.store = Store({self.backend.device: self.backend}, self._limits)
        self.store.event = lambda kind, **fields: self.events.append((kind, fields))
        options = ServeOptions(self.paths.directory)
        identity = identify(self.paths.directory, self.paths.node_id)
        self._server = Server(
            self.store,
            listen(self.paths, options),
            options,
            lambda: take_status(self.store, identity, catalog_url="", catalog_state="ok"),
        )
        self._server.start()
        self._ready.set()
        await self._server.stopping.wait()
        await self._server.stop()
        self.store.segments.close()

    def client(self, name=""):
        """A client in this process, which ends with the block."""
        self._clients.append(Client(self.paths.directory, name))
        return self._clients[-1]

    def call(self, function):
        """Call something in the store's loop, which owns its state; what it returns."""

        async def run():
            return function()

        return self.run(run())

    def run(self, coroutine):
        """Run something in the store's loop to its end; what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def turn_a_bit(self, digest):
        """Make a committed blob wrong, where the backend does not seal."""
        held = self.call(lambda: self.store.segments.blob(self.backend.device, digest))
        memory = self.call(lambda: self.store.segments.segment(held.segment).memory)
        mapping = mapping_of(self.backend, memory)
        mapping.map(Access.WRITE)
        address = mapping.address + held.offset
        poke(address, bytes([peek(address, 1)[0] ^ 1]))
        mapping.close()
