"""A store, and processes with transformers, for all tests of a file."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import struct

import pytest
from hf.jobs import PRELOADED, Job
from support.descriptors import lasting
from support.engine_fixtures import checkpoint
from support.stores import store_without_catalog
from support.waiting import readable

from shared_store.client.session import Session

__all__ = ["checkpoint"]


@pytest.fixture(scope="session", autouse=True)
def preloaded():
    """Start importing transformers before the first test."""
    PRELOADED.begin()


@pytest.fixture(scope="module")
def store():
    """Start a store whose catalog is unreachable: no test here needs it."""
    yield from store_without_catalog()


@pytest.fixture(scope="module")
def processes(store, tmp_path_factory, request):
    """Return a process by name; it starts once, and ends with the file's tests."""
    logs = tmp_path_factory.mktemp("jobs")
    made = {}

    def get(name, **environment):
        if name not in made:
            with lasting(request.config):
                made[name] = Job(store.directory, logs / name, **environment)
        return made[name]

    get.made = made
    yield get
    for one in made.values():
        one.kill()


@pytest.fixture
def job(processes):
    """Return a process by name, with `load(path, device_map)` and `facts(model)`; drop its models after the test."""
    used = {}

    def get(name, **environment):
        used[name] = processes(name, **environment)
        return used[name]

    yield get
    for one in used.values():
        one.forget()


@pytest.fixture
def served(store):
    """Return a function that returns the store's status."""
    with Session.connect(store.directory, autostart=False, name="test") as session:
        yield session.status


_copies = itertools.count(1)


@pytest.fixture
def fresh(checkpoint, tmp_path):
    """Return a function that copies a checkpoint and flips one bit, so that it is new to the store."""

    def make(family):
        number = next(_copies)
        target = tmp_path / f"{family}-{number}"
        shutil.copytree(checkpoint(family), target)
        with (target / "model.safetensors").open("r+b") as file:
            file.seek(-2 * number, os.SEEK_END)  # the low byte of a bfloat16
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return target

    return make


IN_ACCESS, IN_OPEN, IN_NONBLOCK = 0x1, 0x20, 0o4000


@pytest.fixture
def opened():
    """Return a function that watches a file, and returns how often processes opened or read it since the last call."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(IN_NONBLOCK)
    assert watch >= 0

    def see(path=None):
        if path is not None:
            assert libc.inotify_add_watch(watch, os.fsencode(path), IN_ACCESS | IN_OPEN) >= 0
        data = os.read(watch, 1 << 16) if readable(watch, 0) else b""
        return len(data) // struct.calcsize("iIII")

    yield see
    os.close(watch)
