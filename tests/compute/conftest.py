"""Arbiters as processes, and workloads of them."""

from __future__ import annotations

import pytest
from support.arbiters import ArbiterProcess, Gated, SteppingProcess


@pytest.fixture
def start_arbiter():
    """Return a function that starts an arbiter; end all afterwards."""
    started = []

    def start(**settings):
        started.append(ArbiterProcess(**settings))
        return started[-1]

    yield start
    for one in started:
        one.resume() if one._process.poll() is None else None
        one.close()


@pytest.fixture
def arbiter(start_arbiter):
    return start_arbiter()


@pytest.fixture
def gated():
    """Return a function that makes a workload of this process, of the arbiter if one is given."""
    made = []

    def make(number=None, priority=0, *, of=None, **given):
        made.append(Gated())
        return made[-1] if of is None else made[-1].attach(*of.add(number, priority, **given))

    yield make
    for one in made:
        one._stopping.set()
    for one in made:
        one.close()


@pytest.fixture
def process():
    """Return a function that starts a workload in a process of its own."""
    made = []

    def make(number=None, priority=0, *, of=None, **given):
        made.append(SteppingProcess())
        if of is not None:
            made[-1].attach(*of.add(number, priority, **given))
        return made[-1]

    yield make
    for one in made:
        one.kill()
