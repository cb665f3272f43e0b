"""Kill the catalog's server: attaching and publishing go on, and the catalog is complete again afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.content import key
from support.stores import wait_for_status
from support.waiting import wait_until

MODEL = [[1, 3 << 20], [2, 100]]


class Embedded:
    """The embedded server, which the store restarts."""

    def __init__(self, directory):
        self.options = {}
        self.url = f"unix://{directory}/catalog.sock"

    def kill(self, store):
        (pid,) = wait_until(store.children, "the catalog's server")
        os.kill(pid, signal.SIGKILL)

    def come_back(self):
        pass

    def end(self):
        pass


class External:
    """A `redis-server` outside of the store."""

    def __init__(self, directory):
        self._command = ["redis-server", "--port", "0", "--unixsocket", f"{directory}/redis.sock", "--save", ""]
        self.url = f"unix://{directory}/redis.sock"
        self.options = {"redis_url": self.url}
        self.come_back()

    def kill(self, _store):
        self._process.kill()
        self._process.wait()

    def come_back(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def end(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(params=["embedded", pytest.param("redis-server", marks=pytest.mark.redis_server)])
def server(request, directory):
    if request.param == "embedded":
        started = Embedded(directory)
    elif shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH")
    else:
        started = External(directory)
    yield started
    started.end()


def test_the_catalogs_server_is_killed(server, start_store, actor):
    store = start_store(**server.options)
    publisher, client = actor(), store.client()
    publisher.publish(key=key(1), model=MODEL)
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    wait_until(lambda: models(server.url) == {key(1)}, "the model in the catalog")

    server.kill(store)
    wait_for_status(client, lambda status: status.store.state == "degraded" or status.catalog.state == "ok", "the news")
    reader = actor()
    assert reader.open(key=key(1)) == "attached"
    assert reader.publish(key=key(2), model=[[5, 1 << 20]]) == "granted"
    assert reader.digests() == reader.expected()
    publisher.leave(key=key(1))

    server.come_back()
    wait_for_status(client, lambda status: (status.store.state, status.store.reasons) == ("ok", ()), "the recovery")
    wait_until(lambda: models(server.url) == {key(1), key(2)}, "both models in the catalog")


def models(url):
    """Return the keys of the models in the catalog; none while it does not answer."""
    with contextlib.closing(redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0))) as server:
        try:
            found = list(server.scan_iter("wooly:*model*"))
        except redis.ConnectionError:
            return set()
    return {name for number in range(1, 5) for one in found if (name := key(number)).encode() in one}


def test_a_store_whose_catalog_never_answers(start_store, actor):
    """It reports itself degraded, and serves."""
    store = start_store(redis_url="unix:///nowhere/redis.sock")
    one, two = actor(), actor()
    assert one.publish(key=key(1), model=MODEL) == "granted"
    assert two.open(key=key(1)) == "attached"
    status = store.client().session.status()
    assert (status.store.state, status.catalog.state) == ("degraded", "down")
    assert status.store.reasons == ("the catalog does not answer",)
    assert store.stop() == 0
