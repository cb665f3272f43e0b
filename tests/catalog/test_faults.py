"""The catalog when its server dies, hangs or loses data, and when stores die or have successors."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from catalog.conftest import wait_until
from catalog.documents import NOTHING, PROGRAMS, blob, events, expected, lease, model, node, read, snapshot

from shared_store.catalog import Catalog

# A call that waited for a server would take its time-out of 2 s.
AT_ONCE_S = 1.0

# A store from the catalog's point of view: a model with two blobs and a lease, until it is killed.
STORE = """
import sys
from catalog.documents import blob, lease, model, node, snapshot
from shared_store.catalog import Catalog
catalog = Catalog(sys.argv[1], lease_ttl_s=float(sys.argv[3]))
catalog.start(snapshot([model("bb", [blob(1), blob(2)])], [lease(1, "bb")], of=node(sys.argv[2])))
assert catalog.flush(20)
print("whole", flush=True)
sys.stdin.read()
"""

HELD = snapshot([model("aa", [blob(n) for n in range(700)]), model("cc", state="publishing")], [lease(1, "aa")])


class Recorded:
    """A catalog and the history of its state."""

    def __init__(self, url, **options):
        self.states = []
        self.catalog = Catalog(url, on_change=self.states.append, **options)


@pytest.fixture
def recorded(server):
    running = Recorded(server.url, lease_ttl_s=1.5)
    running.catalog.start(HELD)
    assert running.catalog.flush(10)
    yield running
    running.catalog.stop()


@pytest.fixture
def other_store(server):
    """Start a store of another node in another process."""
    started = []

    def start(name, ttl_s):
        process = subprocess.Popen(
            [sys.executable, "-c", STORE, server.url, name, str(ttl_s)],
            env=PROGRAMS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"whole\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_server_killed_and_restarted_empty(server, recorded):
    """The state is `down`, updates and events are accepted, and everything is written after the restart, in order."""
    catalog = recorded.catalog
    server.kill()
    catalog.event("during", number=1)
    wait_until(lambda: catalog.state == "down", "the state to go down")
    for number in range(2, 6):
        catalog.event("during", number=number)
    held = snapshot([model("aa", [blob(1)]), model("dd", [blob(9999)])], [lease(7)])
    catalog.update(held)
    server.restart()
    assert catalog.flush(20)
    assert recorded.states == ["ok", "down", "ok"]
    with server.client() as client:
        assert read(client) == expected(held)
        arrived = events(client)
    assert [e["number"] for e in arrived if e["kind"] == "during"] == ["1", "2", "3", "4", "5"]
    assert arrived[-1]["kind"] == "catalog_restored"
    assert int(arrived[-1]["down_ms"]) > 0


def test_server_unreachable_at_the_start(server):
    """start() returns at once. The catalog is written once the server answers."""
    server.pause()
    recorded = Recorded(server.url)
    began = time.monotonic()
    recorded.catalog.start(HELD)
    assert time.monotonic() - began < AT_ONCE_S
    assert not recorded.catalog.flush(0.1)
    assert recorded.catalog.state == "down"
    server.resume()
    assert recorded.catalog.flush(20)
    with server.client() as client:
        assert read(client) == expected(HELD)
    recorded.catalog.stop()


def test_server_hangs(server, recorded):
    """update() and event() return at once, the state is `down` after a time-out, and everything is written later."""
    catalog = recorded.catalog
    server.pause()
    held = snapshot([model("ee", [blob(3)])])
    began = time.monotonic()
    for number in range(100):
        catalog.update(held)
        catalog.event("during", number=number)
    assert time.monotonic() - began < AT_ONCE_S
    wait_until(lambda: catalog.state == "down", "the time-out")
    assert not catalog.flush(0.1)
    server.resume()
    assert catalog.flush(20)
    assert catalog.state == "ok"
    with server.client() as client:
        assert read(client) == expected(held)
        numbers = [int(e["number"]) for e in events(client) if e["kind"] == "during"]
    assert numbers == list(range(100))


def test_server_hangs_while_the_store_stops(server, recorded):
    """stop() returns within its time-out."""
    server.pause()
    recorded.catalog.update(snapshot())
    began = time.monotonic()
    recorded.catalog.stop(0.5)
    assert time.monotonic() - began < 0.5 + AT_ONCE_S
    server.resume()


def test_more_events_than_fit_are_dropped_and_counted(server, recorded):
    """The newest events remain, and one event replaces the dropped ones, with their number."""
    catalog = recorded.catalog
    server.pause()
    catalog.update(snapshot())
    wait_until(lambda: catalog.state == "down", "the time-out")
    for number in range(2500):
        catalog.event("during", number=number)
    server.resume()
    assert catalog.flush(20)
    with server.client() as client:
        arrived = events(client)
    numbers = [int(e["number"]) for e in arrived if e["kind"] == "during"]
    dropped = [int(e["count"]) for e in arrived if e["kind"] == "events_dropped"]
    assert numbers == list(range(2500 - len(numbers), 2500))
    assert sum(dropped) + len(numbers) == 2500
    assert sum(dropped) > 0
    sequence = [int(e["seq"]) for e in arrived]
    assert sequence == sorted(set(sequence))


@pytest.mark.usefixtures("recorded")
def test_server_emptied_by_another_client(client):
    """FLUSHALL breaks no connection. The heartbeat detects it without an update."""
    client.flushall()
    wait_until(lambda: read(client) == expected(HELD), "the catalog to be rewritten")
    wait_until(lambda: "catalog_restored" in [e["kind"] for e in events(client)], "the event")


@pytest.mark.usefixtures("recorded")
def test_one_key_lost(client):
    """The heartbeat detects a deleted hash of a model."""
    client.delete("wooly:node:n1:model:aa")
    wait_until(lambda: read(client) == expected(HELD), "the model to be rewritten")


def test_scripts_flushed_by_another_client(client, recorded):
    client.script_flush()
    held = snapshot([model("ff")])
    recorded.catalog.update(held)
    assert recorded.catalog.flush(20)
    assert read(client) == expected(held)


def test_server_out_of_memory(client, recorded):
    """A full server refuses additions, and the state is `down`. A smaller snapshot succeeds."""
    catalog = recorded.catalog
    catalog.update(snapshot([model("aa", [blob(1)], manifest=bytes(4_000_000))]))
    assert catalog.flush(10)
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)
    catalog.update(snapshot([model("aa", [blob(1)], manifest=bytes(4_000_000)), model("bb", [blob(2)])]))
    wait_until(lambda: catalog.state == "down", "the refusal")
    assert not catalog.flush(0.5)
    held = snapshot([model("bb", [blob(2)])], [lease(2)])
    catalog.update(held)
    assert catalog.flush(20)
    assert read(client) == expected(held)


def test_entries_of_an_earlier_run_are_removed(server, client, other_store):
    """A killed store left a model, blobs and a lease. Its successor replaces them."""
    other_store("n1", 60).kill()
    successor = Catalog(server.url, lease_ttl_s=60)
    held = snapshot([model("hh", [blob(1), blob(9999)])], [lease(5)], of=node(epoch="epoch-2", started_at=2000.0))
    successor.start(held)
    assert successor.flush(10)
    assert read(client) == expected(held)
    successor.stop()


def test_killed_store_is_removed_after_its_time_to_live(client, recorded, other_store):
    """After SIGKILL, the node and its leases expire, and a living node sweeps its models and blobs only."""
    process = other_store("n2", 1.0)
    assert set(read(client, "n2")["blobs"]) == {blob(1).digest.hex(), blob(2).digest.hex()}
    process.kill()
    wait_until(lambda: not client.exists("wooly:node:n2", "wooly:node:n2:leases"), "the time to live to expire")
    wait_until(lambda: client.zrange("wooly:nodes", 0, -1) == [b"n1"], "the sweep")
    assert read(client, "n2") == NOTHING
    assert not list(client.scan_iter("wooly:node:n2*"))
    assert recorded.catalog.flush(10)
    assert read(client) == expected(HELD)


@pytest.mark.usefixtures("recorded")
def test_store_that_hung_past_its_time_to_live_is_rewritten(client, other_store):
    """A store is stopped until it is swept. After SIGCONT it writes everything again."""
    process = other_store("n2", 1.0)
    whole = read(client, "n2")
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: client.zrange("wooly:nodes", 0, -1) == [b"n1"], "the sweep")
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: read(client, "n2") == whole, "the node to be rewritten")


def test_same_node_twice_the_later_start_wins(server, client, caplog):
    """Writes of the earlier store are refused, in any order of arrival, and its log has the reason."""
    earlier = Catalog(server.url, lease_ttl_s=2)
    earlier.start(HELD)
    assert earlier.flush(10)
    later = Catalog(server.url, lease_ttl_s=2)
    held = snapshot([model("aa", [blob(9999)])], [lease(9)], of=node(epoch="epoch-0", started_at=2000.25))
    with caplog.at_level(logging.WARNING):
        later.start(held)
        assert later.flush(10)
        for number in range(20):
            earlier.update(snapshot([model(f"old{number}", [blob(number)])]))
            earlier.event("too_late")
        wait_until(lambda: "started later" in caplog.text, "the log line")
    assert earlier.state == "down"
    assert not earlier.flush(0.5)
    assert later.flush(10)
    assert later.state == "ok"
    assert read(client) == expected(held)
    assert "too_late" not in [e["kind"] for e in events(client)]
    earlier.stop()
    assert read(client) == expected(held)
    later.stop()


def test_same_node_twice_the_earlier_takes_over_when_the_later_leaves(server, client):
    later = Catalog(server.url)
    later.start(snapshot(of=node(epoch="epoch-2", started_at=2000.0)))
    assert later.flush(10)
    earlier = Catalog(server.url)
    earlier.start(HELD)
    assert not earlier.flush(0.5)
    later.stop()
    assert earlier.flush(20)
    assert read(client) == expected(HELD)
    earlier.stop()


@pytest.mark.redis_server
def test_server_restarted_with_old_data(redis_server):
    """A server with persistence restarts with an earlier state of the same epoch, which is replaced."""
    recorded = Recorded(redis_server.url)
    recorded.catalog.start(HELD)
    assert recorded.catalog.flush(10)
    with redis_server.client() as client:
        client.save()
    # As many of each as before, so that counting them would not tell.
    held = snapshot([model("aa", [blob(n + 1) for n in range(700)]), model("cc", state="publishing")], [lease(2)])
    recorded.catalog.update(held)
    assert recorded.catalog.flush(10)
    redis_server.kill()
    redis_server.restart()
    # Another store comes back first, so that the server knows the scripts again, and the failure of one does not tell.
    other = Catalog(redis_server.url)
    other.start(snapshot(of=node("n2")))
    assert other.flush(10)
    assert recorded.catalog.flush(20)
    with redis_server.client() as client:
        assert read(client) == expected(held)
    for catalog in (recorded.catalog, other):
        catalog.stop()
