"""A store, and processes with transformers in them, for all tests of a file."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hf.jobs import PRELOADED, Job
from support.descriptors import lasting
from support.engine_fixtures import checkpoint
from support.stores import StoreProcess
from support.waiting import readable

from shared_store.client.session import Session

__all__ = ["checkpoint"]


@pytest.fixture(scope="session", autouse=True)
def preloaded():
    """Import transformers while the first test prepares itself."""
    PRELOADED.begin()


@pytest.fixture(scope="module")
def store():
    """A running store. Its catalog's server is away: nothing here needs it."""
    directory = Path(tempfile.mkdtemp(prefix="wooly-"))
    running = StoreProcess(directory, redis_url=f"unix://{directory}/away").start()
    yield running
    running.clean_up()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def processes(store, tmp_path_factory, request):
    """The processes of this file's tests, by their names; starting one takes seconds, so they are used again."""
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
    """A process by its name, with `load(path, device_map)` and `facts(model)` in it. Its models go with the test."""
    used = {}

    def get(name, **environment):
        used[name] = processes(name, **environment)
        return used[name]

    yield get
    for one in used.values():
        one.forget()


@pytest.fixture
def served(store):
    """A function that returns the store's status."""
    with Session.connect(store.directory, autostart=False, name="test") as session:
        yield session.status


_copies = itertools.count(1)


@pytest.fixture
def fresh(checkpoint, tmp_path):
    """A copy of a checkpoint that no store has seen before: it differs from all others by one bit of one weight."""

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
    """Watch a file: a function that tells how often any process opened or read it since the last call."""
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
