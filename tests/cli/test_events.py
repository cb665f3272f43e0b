"""`wooly events` with running stores and servers, and after the store has ended."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.content import key
from support.stores import wait_for_status
from support.waiting import wait_until

import shared_store
from shared_store.catalog.event_buffer import LONGEST_TEXT, EventBuffer
from shared_store.catalog.schema import EVENTS

MODEL = [[1, 100_000]]


@pytest.fixture
def server(directory):
    """The URL of a `redis-server` that outlives stores."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH")
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", f"{directory}/redis.sock", "--save", "", "--dir", directory],
        stdout=subprocess.DEVNULL,
    )
    url = f"unix://{directory}/redis.sock"
    wait_until(lambda: answers(url), "redis-server to answer")
    yield url
    process.kill()
    process.wait()


def answers(url):
    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as connection:
        try:
            return connection.ping()
        except redis.ConnectionError:
            return False


def events(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kinds(wooly, *arguments):
    return [event["kind"] for event in events(wooly("events", "--json", *arguments))]


def publish_and_remove(store, actor):
    """Make three events of a model, and wait until they are in the catalog."""
    reader, client = actor(), store.client()
    reader.publish(key=key(1), model=MODEL)
    reader.leave(key=key(1))
    client.remove(key(1))
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    return client.status()


EXPECTED = ["publish_started", "published", "attached", "removed"]


def test_embedded_catalog(wooly, store, actor):
    """Without option and variable, the URL is the running store's."""
    status = publish_and_remove(store, actor)
    wait_until(lambda: kinds(wooly) == EXPECTED, "the events")
    found = events(wooly("events", "--json"))
    assert [event["seq"] for event in found] == [1, 2, 3, 4]
    assert {event["node"] for event in found} == {status["node"]["id"]}
    published = found[1]
    assert published["fields"]["bytes"] == 100_000
    assert (published["fields"]["key"], published["fields"]["name"]) == (key(1), "model")
    assert abs(published["time"] * 1000 - int(published["id"].partition("-")[0])) < 60_000


def test_last_and_kind(wooly, store, actor):
    publish_and_remove(store, actor)
    wait_until(lambda: kinds(wooly) == EXPECTED, "the events")
    assert kinds(wooly, "--last", "2") == EXPECTED[2:]
    assert kinds(wooly, "--last", "0") == []
    assert kinds(wooly, "--kind", "published", "--kind", "removed") == ["published", "removed"]
    assert kinds(wooly, "--kind", "published", "--last", "1") == ["published"]  # older than the newest one
    assert kinds(wooly, "--kind", "no_such_kind") == []


def test_text(wooly, store, actor):
    """One line for each event, with the prefix of the key and a formatted size."""
    publish_and_remove(store, actor)
    wait_until(lambda: kinds(wooly) == EXPECTED, "the events")
    lines = wooly("events").stdout.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  published +key=0{12} name=model bytes=97\.7KiB pid=\d+", lines[1].rstrip()
    )


@pytest.mark.redis_server
def test_without_a_store(wooly, server, start_store, actor):
    """The URL comes from the variable or the option, the node from the runtime directory."""
    store = start_store(redis_url=server)
    publish_and_remove(store, actor)
    assert store.stop() == 0
    assert kinds(wooly, "--redis-url", server) == EXPECTED
    assert events(wooly("events", "--json", WOOLY_REDIS_URL=server))[-1]["kind"] == "removed"


@pytest.mark.redis_server
def test_all_nodes(wooly, server, start_store, actor):
    """Events of this node only, or of all nodes with their names."""
    store = start_store(redis_url=server)
    publish_and_remove(store, actor)
    store.stop()
    with redis.Redis.from_url(server) as connection:
        other = {
            "kind": "published",
            "node": "other\x1b[1m",
            "epoch": "e",
            "seq": "1",
            "time": "1700000000.5",
            "pid": "x",
        }
        connection.xadd(EVENTS, other)
        connection.xadd(EVENTS, {"what": "nobody of wooly wrote this"})
    assert kinds(wooly, "--redis-url", server) == EXPECTED
    everything = events(wooly("events", "--all-nodes", "--json", "--redis-url", server))
    assert [event["kind"] for event in everything] == [*EXPECTED, "published", ""]
    assert everything[-2]["fields"] == {"pid": "x"}
    shown = wooly("events", "--all-nodes", "--redis-url", server).stdout.splitlines()
    assert "other?[1m  published" in shown[-2]


def test_follow(wooly, background, store, actor):
    """New events are printed once each, after past events. Ctrl-C ends with exit code 0."""
    reader, client = actor(), store.client()
    reader.publish(key=key(1), model=MODEL)
    wait_until(lambda: kinds(wooly) == EXPECTED[:3], "the first events")
    process = background("events", "--follow", "--json", "--last", "1")
    assert json.loads(line_of(process))["kind"] == "attached"
    reader.leave(key=key(1))
    client.remove(key(1))
    assert json.loads(line_of(process))["kind"] == "removed"
    client.publish(key(2), MODEL)
    assert [json.loads(line_of(process))["kind"] for _ in range(3)] == EXPECTED[:3]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.communicate() == ("", "")


def line_of(process):
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line


def test_follow_ends_with_the_server(wooly, background, store, actor):
    """The end of the server ends the command with an error."""
    publish_and_remove(store, actor)
    wait_until(lambda: kinds(wooly) == EXPECTED, "the events")
    process = background("events", "--follow", "--json", "--last", "1")
    assert line_of(process)
    store.kill()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 21
    assert "[catalog_unavailable]" in said
    assert "Traceback" not in said


def test_no_store_and_no_url(wooly):
    """The URL of the catalog, or the name of the node, is unknown: the error names the option that sets it."""
    done = wooly("events")
    assert done.returncode == 21
    assert "the URL of the catalog is unknown" in done.stderr
    assert "pass --redis-url" in done.stderr
    done = wooly("events", "--redis-url", "redis://127.0.0.1:1/0")
    assert done.returncode == 21
    assert "the name of this node is unknown" in done.stderr
    assert "pass --all-nodes" in done.stderr


def test_a_server_that_does_not_answer(wooly):
    done = wooly("events", "--all-nodes", "--redis-url", "redis://127.0.0.1:1/0")
    assert (done.returncode, done.stdout) == (21, "")
    assert "the catalog does not answer" in done.stderr


def test_an_invalid_url(wooly):
    done = wooly("events", "--all-nodes", "--redis-url", "file:///etc/passwd")
    assert done.returncode == 2
    assert "[config]" in done.stderr


def test_long_texts_are_cut():
    """Clients choose names and reasons of any length, and 1000 events may wait for the server."""
    buffer = EventBuffer(10)
    buffer.add("fallback", {"reason": "r" * 10_000_000, "pid": 1})
    (event,) = buffer.take(1)
    assert event.fields == {"reason": "r" * LONGEST_TEXT, "pid": 1}


def test_every_kind_is_described():
    """The document's table has all kinds that the code writes, and no others."""
    written, words = set(), set()
    for file in Path(shared_store.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "event":
                written |= texts(node.args[0])
            words |= texts(node)
    text = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    table = text.partition("## `wooly events`")[2].partition("\n## ")[0].partition("| kind |")[2]
    described = set(re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE))
    assert len(written) >= 8
    assert written <= described
    assert described <= words


def texts(node):
    """Return the string constants in an expression."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
