"""The file system of the runtime directory is full or read-only at the start, or fills up under a running store."""

from __future__ import annotations

import os

import pytest
from support.content import key
from support.filesystems import SmallDisk, may_mount
from support.stores import StoreProcess, resident, wait_for_status
from support.waiting import open_segments, wait_until

from shared_store.base.errors import ConfigError
from shared_store.runtime import spawn
from shared_store.runtime.node import node_id

pytestmark = pytest.mark.skipif(not may_mount(), reason="this process may not mount file systems")

MODEL = [[1, 3 << 20], [2, 100]]


@pytest.fixture
def disk(directory):
    mounted = SmallDisk(directory)
    yield mounted
    mounted.unmount()


def refused(directory):
    """Start a store there: it exits with the reason, and a client that would start it gets the same."""
    with pytest.raises(ConfigError, match="cannot write in the runtime directory"):
        spawn.start(directory)
    code, said = StoreProcess(directory).refused()
    assert code == 2
    assert "cannot write in the runtime directory" in said
    assert "set WOOLY_RUNTIME_DIR" in said
    assert "Traceback" not in said


def test_a_full_disk_refuses_a_store(disk, directory, start_store):
    """It leaves nothing half written: once there is space, a store starts."""
    disk.fill()
    refused(directory)
    disk.empty()
    assert start_store().client().publish(key(1), MODEL) == "granted"


def test_a_disk_without_a_byte_for_the_nodes_name_refuses_a_store(disk, directory, start_store):
    """The lock, which needs only an inode, is created; the name is not, and no empty file remains."""
    with (directory / "filling").open("wb", buffering=0) as file:
        for _ in range(256):
            file.write(bytes(4096))
    code, said = StoreProcess(directory).refused()
    assert (code, "No space left on device" in said) == (2, True)
    assert node_id(directory / "node-id") is None
    disk.empty()
    node = start_store().client().status()["node"]["id"]
    assert node == node_id(directory / "node-id")


def test_a_read_only_disk_refuses_a_store(disk, directory, start_store):
    disk.read_only()
    refused(directory)
    disk.writable()
    assert start_store().client().alive()


def test_the_disk_is_full_in_the_middle_of_publishing(disk, directory, start_store, actor):
    """Weights are not stored there: the model is committed and served; the store ends cleanly and restarts."""
    store = start_store()
    reader, publisher = actor(), actor()
    reader.publish(key=key(1), model=MODEL)
    publisher.open(key=key(2))
    publisher.plan(key=key(2), model=[[3, 1 << 20]])
    publisher.fill(key=key(2))
    disk.fill()

    publisher.unmap()
    publisher.commit(key=key(2))
    late = actor()
    assert late.open(key=key(2)) == "attached"
    for process in (reader, publisher, late):
        assert process.digests() == process.expected()
    client = store.client()
    publisher.leave(key=key(2))
    late.kill()
    wait_for_status(client, lambda status: status.models[1].readers == 0, "the lease to end")
    client.remove(key(2))
    assert resident(client) == 4 << 20
    wait_until(lambda: open_segments(store.pid) == 1, "the segment to go")
    assert store.stop() == 0
    assert not (directory / "store.sock").exists()
    disk.empty()
    assert start_store().client().publish(key(1), MODEL) == "granted"


def test_the_disk_is_full_and_the_catalogs_server_is_killed(disk, start_store, actor):
    """It writes nothing to disk, so it restarts."""
    store = start_store()
    client = store.client()
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    disk.fill()
    (server,) = store.children()
    os.kill(server, 9)
    wait_until(lambda: store.children() not in ([], [server]), "the server to be started again")
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    assert actor().publish(key=key(1), model=MODEL) == "granted"
