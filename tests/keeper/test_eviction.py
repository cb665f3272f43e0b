"""A full device under a keeper: evicted memory is free when the keeper has closed its descriptor, not before."""

from __future__ import annotations

import os
import signal

import pytest
from support.content import key
from support.devices import DEVICE, limited
from support.waiting import process_state, wait_until

from shared_store.base.errors import ConnectionLostError, OutOfMemoryError

MIB = 1 << 20


def model(seed, mib=3):
    """Blobs that need a segment of the next even number of MiB."""
    return [[seed, mib * MIB]]


class Node:
    """A keeper, its store, and clients that share a device of three segments of 4 MiB."""

    def __init__(self, start_kept, actor, *, free="known", capacity=13 * MIB, sitecustomize=None, **options):
        self._actor = actor
        self.environment = limited(capacity, free=free)
        environment = {**os.environ, **self.environment}
        if sitecustomize:
            environment["PYTHONPATH"] = os.pathsep.join([str(sitecustomize), environment["PYTHONPATH"]])
        self.kept = start_kept(popen={"env": environment}, **options)

    def client(self):
        client = self._actor(connect=False, env=self.environment)
        client.connect(directory=str(self.kept.directory), device=DEVICE)
        return client

    def cache(self, client, *numbers, mib=3):
        """Publish models, and leave them without readers."""
        for number in numbers:
            client.publish(key=key(number), model=model(number, mib))
            client.leave(key=key(number))

    def plan(self, client, number, mib=3):
        client.open(key=key(number))
        client.plan(key=key(number), model=model(number, mib))

    def commit(self, client, number):
        """Commit what was filled, and check every byte."""
        client.unmap()
        client.commit(key=key(number))
        assert client.digests() == client.expected()

    def keys(self):
        return {one.key for one in self.kept.status().models if one.state == "committed"}

    def evictions(self):
        return self.kept.status().counters.evictions

    def releasing(self):
        (device,) = [one for one in self.kept.status().devices if one.id == DEVICE]
        return device.releasing_bytes

    def stop_keeper(self):
        os.kill(self.kept.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(self.kept.pid) == "T", "the keeper to be stopped")

    def resume_keeper(self):
        os.kill(self.kept.pid, signal.SIGCONT)


PATIENT = """
from support.device_site import sitecustomize
from shared_store.store.state import releases
releases.CONFIRMED_WITHIN_S = 60.0
"""


@pytest.fixture
def node(start_kept, actor, tmp_path_factory):
    """Return a function that starts a node. Its store waits long for its keeper, but with `patient=False`."""

    def start(*, patient=True, sitecustomize=None, **options):
        if patient and not sitecustomize:
            sitecustomize = tmp_path_factory.mktemp("site")
            (sitecustomize / "sitecustomize.py").write_text(PATIENT)
        return Node(start_kept, actor, sitecustomize=sitecustomize, **options)

    return start


@pytest.mark.parametrize("free", ["known", "unknown"])
def test_a_full_device_evicts_one_model_and_waits_for_its_memory(node, free):
    """The keeper reads `Release` late. The allocation goes on once it has, and no second model is evicted."""
    it = node(free=free)
    client = it.client()
    it.cache(client, 1, 2, 3)
    it.plan(client, 4)
    it.stop_keeper()
    client.begin("fill", key=key(4))
    wait_until(lambda: it.evictions() == 1, "the eviction")
    assert it.releasing() == 4 * MIB
    assert client.idle()
    it.resume_keeper()
    client.finish()
    assert it.keys() == {key(2), key(3)}
    assert it.releasing() == 0
    it.commit(client, 4)
    assert it.evictions() == 1


def test_a_full_device_without_pauses(node):
    """Thirty models through a device of three: each publication evicts exactly one."""
    it = node()
    client = it.client()
    it.cache(client, *range(1, 31))
    assert it.evictions() == 27
    assert it.keys() == {key(28), key(29), key(30)}


@pytest.mark.parametrize("free", ["known", "unknown"])
def test_a_model_whose_memory_would_not_be_needed_stays(node, free):
    """3 MiB are missing. The oldest model would free 2 MiB, and the next one 4 MiB: that is enough alone."""
    it = node(free=free)
    client = it.client()
    it.cache(client, 1, mib=1)
    it.cache(client, 2, 3)
    it.plan(client, 4, mib=5)
    client.fill(key=key(4))
    it.commit(client, 4)
    assert it.keys() == {key(1), key(3), key(4)}
    assert it.evictions() == 1


def test_two_publishers_on_a_full_device(node):
    """One at a time frees memory, so neither takes what was freed for the other, and two models are evicted."""
    it = node()
    first, second = it.client(), it.client()
    it.cache(first, 1, 2, 3)
    it.plan(first, 4)
    it.plan(second, 5)
    it.stop_keeper()
    for client, number in ((first, 4), (second, 5)):
        client.begin("fill", key=key(number))
    wait_until(lambda: it.releasing() == 4 * MIB, "the wait for the keeper")
    assert it.evictions() == 1
    it.resume_keeper()
    first.finish()
    second.finish()
    assert it.keys() == {key(3)}
    assert it.evictions() == 2
    it.commit(first, 4)
    it.commit(second, 5)


def test_keeper_killed_before_it_confirms(node):
    """Its descriptors are closed with it. The allocation goes on, and the store has another keeper."""
    it = node()
    client = it.client()
    it.cache(client, 1, 2, 3)
    it.plan(client, 4)
    it.stop_keeper()
    client.begin("fill", key=key(4))
    wait_until(lambda: it.releasing() == 4 * MIB, "the wait for the keeper")
    os.kill(it.kept.pid, signal.SIGKILL)
    it.kept.wait()
    client.finish()
    assert it.evictions() == 1
    wait_until(lambda: it.kept.status().keeper.state == "ok", "another keeper")
    it.commit(client, 4)
    client.leave(key=key(4))
    it.cache(client, 5)  # the other one confirms, too
    assert it.keys() == {key(3), key(4), key(5)}


def test_store_killed_while_it_waits_for_the_keeper(node):
    """The keeper still carries out the release. The next store has the other models, and the freed memory."""
    it = node()
    client = it.client()
    it.cache(client, 1, 2, 3)
    it.plan(client, 4)
    pid = it.kept.store_pid
    it.stop_keeper()
    client.begin("fill", key=key(4))
    wait_until(lambda: it.releasing() == 4 * MIB, "the wait for the keeper")
    os.kill(pid, signal.SIGKILL)
    it.resume_keeper()
    with pytest.raises(ConnectionLostError):
        client.finish()
    client = it.client()
    assert it.keys() == {key(2), key(3)}
    client.publish(key=key(4), model=model(4))
    assert client.digests() == client.expected()
    assert it.keys() == {key(2), key(3), key(4)}
    assert it.evictions() == 0


def test_a_keeper_that_does_not_answer_affects_the_publisher_alone(node):
    """After the time-out the publisher gets an error, and nothing else is evicted: that would free nothing either."""
    it = node(patient=False)
    client, reader = it.client(), it.client()
    it.cache(client, 1, 2, 3)
    it.plan(client, 4)
    it.stop_keeper()
    client.begin("fill", key=key(4))
    wait_until(lambda: it.releasing() == 4 * MIB, "the wait for the keeper")
    assert reader.open(key=key(3)) == "attached"
    assert client.idle()
    assert reader.digests() == reader.expected()
    with pytest.raises(OutOfMemoryError, match="4194304 bytes were released, but the keeper does not answer"):
        client.finish()
    status = it.kept.status()
    assert status.store.state == "degraded"
    (reason,) = [one for one in status.store.reasons if "keeper" in one]
    assert reason.startswith("the keeper has not confirmed the release of 1 segments (4194304 bytes)")
    assert (status.counters.evictions, status.counters.unconfirmed_releases) == (1, 1)
    assert it.releasing() == 4 * MIB
    it.resume_keeper()
    wait_until(lambda: it.releasing() == 0, "the late confirmation")
    assert not [one for one in it.kept.status().store.reasons if "keeper" in one]
    client.fill(key=key(4))
    it.commit(client, 4)
    assert it.evictions() == 1


def test_under_a_limit_an_allocation_goes_on_after_the_time_out(node):
    """The device has the memory. Until the keeper confirms, the released bytes count as used."""
    it = node(patient=False, capacity=100 * MIB, max_resident={DEVICE: 8 * MIB})
    client = it.client()
    it.cache(client, 1, 2)
    it.stop_keeper()
    it.plan(client, 3)
    assert (it.evictions(), it.releasing()) == (1, 4 * MIB)
    client.begin("fill", key=key(3))
    assert client.idle()
    client.finish()
    assert it.releasing() == 4 * MIB
    assert it.kept.status().counters.unconfirmed_releases == 1
    it.resume_keeper()
    it.commit(client, 3)
    wait_until(lambda: it.releasing() == 0, "the late confirmation")
    assert it.keys() == {key(2), key(3)}


def test_an_allocation_that_nobody_wants_any_more_evicts_nothing(node):
    """The publisher ends while another waits for the keeper: what it would have needed stays."""
    it = node()
    first, second = it.client(), it.client()
    it.cache(first, 1, 2, 3)
    it.plan(first, 4)
    it.plan(second, 5)
    it.stop_keeper()
    first.begin("fill", key=key(4))
    wait_until(lambda: it.releasing() == 4 * MIB, "the wait for the keeper")
    second.begin("fill", key=key(5))
    second.kill()
    wait_until(lambda: key(5) not in {one.key for one in it.kept.status().models}, "the publication to end")
    it.resume_keeper()
    first.finish()
    it.commit(first, 4)
    assert it.evictions() == 1
    assert it.keys() == {key(2), key(3), key(4)}


EARLIER = """
import sys
from support.device_site import sitecustomize
if "shared_store.keeper" in sys.orig_argv:
    from shared_store.keeper.keeper import Keeper
    from shared_store.protocol.keeper_messages import JournalState
    Keeper._confirm = lambda *_: None
    Keeper._journal_state = lambda keeper: JournalState(keeper._retained.journal_reason)
"""


def test_a_keeper_of_an_earlier_version_confirms_nothing(node, tmp_path):
    """The store does not wait for it for good, and does not call it degraded: the memory counts as free in time."""
    (tmp_path / "sitecustomize.py").write_text(EARLIER)
    it = node(sitecustomize=tmp_path)
    client = it.client()
    it.cache(client, 1, 2, 3, 4)
    assert it.keys() == {key(2), key(3), key(4)}
    status = it.kept.status()
    assert (status.counters.evictions, status.counters.unconfirmed_releases) == (1, 0)
    assert not [one for one in status.store.reasons if "keeper" in one]
    assert it.releasing() == 0
