"""Agents of workloads, at stores that a test plays and at real ones."""

from __future__ import annotations

import os
import threading

import pytest
from support.fixtures import actor, directory, start_store, store
from support.holders import Holder
from support.scripted import ScriptedStore
from support.stores import StoreProcess
from support.workloads import Workload

from shared_store.client.session import Session
from shared_store.overcommit.agent import Agent
from shared_store.protocol import messages

__all__ = ["actor", "agents", "directory", "played", "start_store", "store"]

NBYTES = 1 << 20


@pytest.fixture
def locks(monkeypatch, tmp_path):
    """Locks of devices of this test alone; workloads without a store keep no reserve."""
    monkeypatch.setenv("WOOLY_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("WOOLY_VRAM_RESERVE", "0")


@pytest.fixture
def stores(directory, settings):
    """Return a function that starts a store with a module's settings, with or without a keeper; end all afterwards."""
    started = []

    def start(kind=StoreProcess, **options):
        started.append(kind(directory, redis_url=f"unix://{directory}/away", **{**settings, **options}))
        return started[-1].start()

    yield start
    for one in reversed(started):
        one.clean_up()


@pytest.fixture
def workloads(directory, nbytes):
    """Return a function that starts workload processes of a module's size, which join; end all afterwards."""
    made = []

    def make(name, *, start=True, **given):
        made.append(Workload(env=dict(os.environ)))
        assert made[-1].join(directory=str(directory), name=name, nbytes=nbytes, **given) == name
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def agents(directory):
    """Return a function that makes an agent of a holder; both end with the test."""
    made = []

    def make(name="engine", *, nbytes=NBYTES, devices=("cpu",), **given):
        holder = Holder(nbytes)
        agent = Agent(
            lambda identity: Session.connect(directory, name=identity.name, autostart=False, identity=identity),
            holder,
            kind="vllm",
            name=name,
            devices=devices,
            **given,
        )
        made.append((agent, holder))
        return agent, holder

    yield make
    for agent, holder in made:
        holder.stops.clear()
        holder.go_on(holder.step)
        agent.close()
        if agent._moves is not None:
            agent._moves._thread.join(10)
            assert not agent._moves._thread.is_alive()
        holder.close()


class Played:
    """A store that a test plays: it greets, and answers what is the same in all tests."""

    def __init__(self, directory):
        self._directory = directory
        self._store = None
        self.peer = None
        self.open()

    def open(self):
        self._store = ScriptedStore(self._directory)

    def close(self):
        """End, with all connections."""
        if self._store is not None:
            self._store.close()
            (self._directory / "store.sock").unlink(missing_ok=True)
        self._store = None

    def accept(self, *, capabilities=(messages.WORKLOADS,)):
        self.peer, hello = self._store.accept()
        self.peer.send(messages.Welcome(messages.VERSION, "0", os.getpid(), 1, capabilities))
        return hello

    def joins(self, begin=None, *, name="engine", priority=0):
        """Greet a client and let it join. Returns its greeting and its declaration. `begin`: makes it connect."""
        client = threading.Thread(target=begin or (lambda: None))
        client.start()
        hello = self.accept()
        join = self.next(messages.Join)
        self.peer.send(messages.Joined(join.id, name, priority))
        client.join(10)
        assert not client.is_alive()
        return hello, join

    def next(self, kind):
        """Receive the next message, which must be of a kind."""
        message = self.peer.receive()
        assert isinstance(message, kind), message
        return message

    def reported(self, state):
        """Receive the next message, which must be a report of a state."""
        report = self.next(messages.ReportWorkload)
        assert report.state == state, report
        self.peer.send(messages.Done(report.id))
        return report

    def grant(self):
        """Receive a wait for memory, and end it."""
        wait = self.next(messages.TakeRoom)
        self.peer.send(messages.RoomTaken(wait.id))
        return wait

    def swap_out(self, *, number=1, active=False, within_s=10.0):
        self.peer.send(messages.SwapOut(number, "a test", within_s, active))
        assert self.next(messages.Accepted).id == number


@pytest.fixture
def played(directory):
    played = Played(directory)
    yield played
    played.close()
