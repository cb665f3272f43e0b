"""Fixtures: stores and client processes with the tests' device."""

import os

import pytest
from support.actors import Actor
from support.devices import DEVICE, ENVIRONMENT, Device
from support.fixtures import directory
from support.stores import KeptStore

import shared_store.memory.cuda.vmm

__all__ = ["directory", "process", "process_of", "start", "store", "swap_dir"]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    monkeypatch.setattr(shared_store.memory.cuda.vmm, "CudaBackend", Device)


@pytest.fixture
def swap_dir(tmp_path):
    path = tmp_path / "swap"
    path.mkdir()
    return path


@pytest.fixture
def start(directory):
    """Return a function that starts a keeper and its store with options. They end with the test."""
    started = []

    def make(**options):
        started.append(KeptStore(directory, redis_url=f"unix://{directory}/away", **options))
        return started[-1].start(env={**os.environ, **ENVIRONMENT})

    yield make
    for store in started:
        store.clean_up()


@pytest.fixture
def store(start):
    """Start a keeper and its store."""
    return start()


@pytest.fixture
def process_of(directory):
    """Return a function that starts a client process of the running store. They end with the test."""
    made = []

    def make(name=""):
        made.append(Actor(env={**os.environ, **ENVIRONMENT}))
        made[-1].connect(directory=str(directory), name=name, device=DEVICE)
        return made[-1]

    yield make
    for client in made:
        client.kill()


@pytest.fixture
def process(store, process_of):
    """Start a store, and return the function that starts client processes."""
    assert store.pid
    return process_of
