"""Models with any manifest: publish them, read them back, and change a resident bit without the store."""

from __future__ import annotations

import ctypes
from pathlib import Path

from support.client import Client
from support.hostmemory import peek, poke

from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.transfer.resident import attach, committed

UNSEALED = (str(Path(__file__).with_name("unsealed_store_main.py")),)
"""The program of a store whose segments are not sealed, so that :func:`turn_a_bit` works."""


def publish(session, manifest, contents):
    """Publish a manifest on the device `cpu`, with the bytes of each of its blobs."""
    backend = MemfdBackend()
    asked = {"name": manifest.name, "engine": manifest.engine, "device": "cpu", "publish": True, "timeout_s": 10}
    assert session.open(manifest.key, **asked) is None
    planned, fds = session.plan(manifest.key, manifest.blobs)
    fds.close()
    for number, info in enumerate(planned.segments):
        if not info.promised:
            continue
        with session.fill(manifest.key, info.id) as fd:
            mapping = Mapping(backend, backend.import_fd(fd.fileno(), info.nbytes))
        mapping.map(Access.WRITE)
        for place, data in zip(planned.places, contents, strict=True):
            if place.new and place.segment == number:
                ctypes.memmove(mapping.address + place.offset, data, len(data))
        mapping.close()
    _, fds = session.commit(manifest)
    fds.close()
    session.leave(manifest.key)


def resident(session, key):
    """Return the manifest of a resident model, and the bytes of each of its blobs."""
    with attach(session, committed(session.status().models, key), MemfdBackend()) as model:
        blobs = [peek(*model.spans[blob.digest]) for blob in model.manifest.blobs]
        return model.manifest, blobs


def turn_a_bit(directory, key, blob=0, backend=None):
    """Flip a bit of a published blob in place, in a store that is `UNSEALED`, or on a GPU (with its backend)."""
    client = Client(directory, "stray")
    client.backend = backend or client.backend
    try:
        assert client.open(key, publish=False, device=client.backend.device) == "attached"
        place = client.places[blob]
        client.mappings[place.segment].map(Access.WRITE)
        at = client.mappings[place.segment].address + place.offset
        poke(at, bytes([peek(at, 1)[0] ^ 1]))
    finally:
        client.unmap_all()
        client.close()
