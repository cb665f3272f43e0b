"""Agents of workloads, at stores that a test plays and at real ones."""

from __future__ import annotations

import os
import threading

import pytest
from support.fixtures import actor, directory, start_store, store
from support.holders import Holder
from support.scripted import ScriptedStore

from shared_store.client.session import Session
from shared_store.overcommit.agent import Agent
from shared_store.protocol import messages

__all__ = ["actor", "agents", "directory", "played", "start_store", "store"]

NBYTES = 1 << 20


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
