"""Long work in the event loop pauses between slices; what did not change is not made again."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
from support.content import key, manifest_of

from shared_store.base.layout import GRANULARITY
from shared_store.base.manifest import Blob, encode
from shared_store.store.assembly import Parts
from shared_store.store.observe.catalog_documents import CatalogDocuments
from shared_store.store.observe.identity import Identity
from shared_store.store.observe.loop_times import LoopTimes
from shared_store.store.observe.snapshot import Snapshots
from shared_store.store.pace import SLICE, Pace
from shared_store.store.space.compaction_plan import MAX_BLOBS, choose
from shared_store.store.state.clients import Client
from shared_store.store.state.compactions import Source

IDENTITY = Identity("node", "epoch", "host", Path("/nowhere"), 0.0, 0.0)


def blobs_of(model, count):
    return [Blob(f"{model} {number}".encode().ljust(32), 512) for number in range(count)]


@pytest.fixture
def parts():
    """The parts of a store with three models of 100 blobs; client 1 reads the first."""
    parts = Parts({}, {})
    for model in range(3):
        add(parts, model, 100)
    client = Client(1, 100, 1000, "reader")
    parts.state.clients[1] = client
    parts.state.read_again(client, key(0), 0)
    return parts


def add(parts, model, blobs):
    manifest = manifest_of(key(model), blobs_of(model, blobs))
    parts.state.segments.take_back(model + 1, "cpu", GRANULARITY * (1 + blobs // 4096))
    locations = [(model + 1, 512 * number) for number in range(blobs)]
    parts.state.readmit(encode(manifest), manifest, locations)


def snapshots_of(parts):
    return Snapshots(
        parts.state, parts.devices, parts.keeper, parts.times, LoopTimes(), IDENTITY, parts.pages, parts.compute
    )


def test_other_callbacks_run_between_slices():
    async def work():
        ran = []
        loop = asyncio.get_running_loop()
        pace = Pace()
        for number in range(5):
            loop.call_soon(ran.append, number)
            await pace.through(itertools.repeat(1, SLICE))
            assert ran == list(range(number + 1))
        assert pace.slices == 5
        loop.call_soon(ran.append, 5)
        await pace.through([SLICE - 1])
        assert ran == list(range(5))

    asyncio.run(work())


def test_catching_up_pauses_and_the_status_is_that_of_its_moment(parts):
    """A model that is removed while the sums are updated is in none of them."""
    add(parts, 3, SLICE)
    add(parts, 4, SLICE)
    snapshots = snapshots_of(parts)

    async def work():
        catching_up = asyncio.ensure_future(snapshots.catch_up())
        await asyncio.sleep(0)
        assert not catching_up.done()
        parts.state.remove(key(3))
        await catching_up
        return snapshots.take(catalog_url="", catalog_state="ok")

    status = asyncio.run(work())
    assert {model.key: model.unique_bytes for model in status.models} == {
        **{key(model): 51_200 for model in range(3)},
        key(4): 512 * SLICE,
    }
    assert (status.totals.mapped_bytes, status.totals.saved_bytes) == (51_200, 0)


def test_documents_that_did_not_change_are_the_same_objects(parts):
    documents = CatalogDocuments(parts.state, snapshots_of(parts), IDENTITY)
    before = documents.take()
    assert [model.state for model in before.models] == ["committed"] * 3
    assert [(lease.client, lease.key, lease.role) for lease in before.leases] == [(1, key(0), "reader")]
    parts.state.remove(key(1))
    add(parts, 1, 50)
    add(parts, 5, 10)
    after = {model.key: model for model in documents.take().models}
    assert after.keys() == {key(number) for number in (0, 1, 2, 5)}
    assert after[key(0)] is before.models[0]
    assert after[key(2)] is before.models[2]
    assert len(after[key(1)].blobs) == 50
    assert documents.take().leases[0] is before.leases[0]


def test_documents_are_made_in_slices(parts):
    add(parts, 3, SLICE)
    documents = CatalogDocuments(parts.state, snapshots_of(parts), IDENTITY)

    async def work():
        making = asyncio.ensure_future(documents.catch_up())
        await asyncio.sleep(0)
        assert not making.done()
        parts.state.remove(key(2))
        await making
        return documents.take()

    assert [model.key for model in asyncio.run(work()).models] == [key(0), key(1), key(3)]


def test_a_compaction_moves_a_bounded_number_of_blobs():
    """Segments of a thousand small blobs are packed four at a time; a segment with more is compacted alone."""
    sources = [
        Source(model, 4 * GRANULARITY, tuple((one, 512 * at) for at, one in enumerate(blobs_of(model, 1000))))
        for model in range(1, 9)
    ]
    plan = choose(sources, free=1 << 40)
    assert len(plan.sources) == MAX_BLOBS // 1000 == 4
    assert len(plan.moves) == 4000
    many = Source(9, 64 * GRANULARITY, tuple((one, 512 * at) for at, one in enumerate(blobs_of(9, MAX_BLOBS + 1))))
    assert choose([many, *sources], free=1 << 40).sources == (9,)
