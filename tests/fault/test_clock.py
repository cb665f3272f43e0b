"""The wall clocks of store, catalog and client jump: no lease and no time-out depends on them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import redis
from support.clocks import Clock
from support.content import key
from support.rawclient import RawClient
from support.stores import wait_for_status
from support.waiting import wait_until

from shared_store.store.server import HELLO_WITHIN_S

MODEL = [[1, 3 << 20], [2, 100]]
DAY = 86_400
YEARS = int(time.time())  # since 1970
JUMPS = {"a month ahead": 30 * DAY, "a month back": -30 * DAY, "to 1971": 365 * DAY - YEARS}


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path)


def test_the_clock_that_these_tests_shift(clock):
    """A process sees the wall clock jump, and the monotonic clock go on: a control for the other tests."""
    program = """
import sys, time
for _ in sys.stdin:
    print(time.time(), time.monotonic(), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clock.environment, bufsize=0
    )

    def ask():
        process.stdin.write(b"\n")
        return [float(word) for word in process.stdout.readline().split()]

    try:
        wall, monotonic = ask()
        clock.shift(DAY)
        later_wall, later_monotonic = ask()
    finally:
        process.kill()
        process.communicate()
    assert abs(later_wall - wall - DAY) < 60
    assert abs(later_monotonic - monotonic) < 60


@pytest.mark.parametrize("jump", JUMPS)
def test_the_clock_jumps(clock, directory, start_store, actor, jump):
    """Readers read, waiters are served, published bytes are right, and the catalog recovers."""
    store = start_store(popen={"env": clock.environment})
    reader, publisher, waiter = (actor(env=clock.environment) for _ in range(3))
    reader.publish(key=key(1), model=MODEL)
    publisher.open(key=key(2))
    publisher.plan(key=key(2), model=[[3, 1 << 20]])
    waiter.begin("open", key=key(2))
    client = store.client()
    wait_for_status(client, lambda status: any(one.role == "waiting" for one in status.clients), "the wait")
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    began, uptime = time.monotonic(), client.session.status().store.uptime_s

    clock.shift(JUMPS[jump])

    publisher.fill(key=key(2))
    assert waiter.idle()
    publisher.unmap()
    publisher.commit(key=key(2))
    assert waiter.finish() == "attached"
    assert actor(env=clock.environment).open(key=key(1)) == "attached"
    for process in (reader, publisher, waiter):
        assert process.alive()
        assert process.digests() == process.expected()
    status = client.session.status()
    assert {model.key: model.readers for model in status.models} == {key(1): 2, key(2): 2}
    assert 0 <= status.store.uptime_s - uptime <= time.monotonic() - began + 0.1
    assert status.counters.protocol_errors == 0
    wait_until(
        lambda: abs(heartbeat(directory, status.node.id) - time.time() - JUMPS[jump]) < 60, "a heartbeat after it"
    )
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog after the jump")
    assert store.stop() == 0
    assert not (directory / "store.sock").exists()


def heartbeat(directory, node):
    """Return the time of the node's last heartbeat, by the clock of the catalog's server, which jumped too."""
    with redis.Redis.from_url(f"unix://{directory}/catalog.sock") as server:
        return float(server.hget(f"wooly:node:{node}", "heartbeat") or 0)


def test_the_clock_jumps_while_a_client_says_nothing(clock, start_store):
    """A jump forward does not end the time-out of the greeting, and a jump back does not restart it."""
    store = start_store(popen={"env": clock.environment})
    with RawClient(store.paths.socket, greet=False, timeout_s=60) as silent:
        began = time.monotonic()
        clock.shift(DAY)
        client = store.client()
        assert client.publish(key(1), MODEL) == "granted"
        clock.shift(-DAY)
        assert silent.ended()
        assert HELLO_WITHIN_S - 1 < time.monotonic() - began < HELLO_WITHIN_S + 20
    wait_until(lambda: len(client.session.status().clients) == 1, "the silent one to be gone")
