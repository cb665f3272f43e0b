"""Stores and clients that have the tests' device."""

import os

import pytest
from support.actors import Actor
from support.devices import DEVICE, ENVIRONMENT, Device
from support.fixtures import directory
from support.stores import KeptStore

import shared_store.memory.cuda.vmm

__all__ = ["directory", "kept", "process", "process_of", "start"]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    monkeypatch.setattr(shared_store.memory.cuda.vmm, "CudaBackend", Device)


@pytest.fixture
def start(directory):
    """Start a keeper and its store, with options; they are ended with the test."""
    started = []

    def make(**options):
        started.append(KeptStore(directory, redis_url=f"unix://{directory}/away", **options))
        return started[-1].start(env={**os.environ, **ENVIRONMENT})

    yield make
    for one in started:
        one.clean_up()


@pytest.fixture
def kept(start):
    """A keeper and its store."""
    return start()


@pytest.fixture
def process_of(directory):
    """Make client processes of the device, of whatever store there is; all are ended with the test."""
    made = []

    def make(name=""):
        made.append(Actor(env={**os.environ, **ENVIRONMENT}))
        made[-1].connect(directory=str(directory), name=name, device=DEVICE)
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def process(kept, process_of):
    """The same, with a store."""
    assert kept.pid
    return process_of
