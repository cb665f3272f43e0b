"""Fixtures for real stores and clients; a folder's `conftest.py` imports them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from support.actors import Actor
from support.stores import StoreProcess

__all__ = ["actor", "directory", "start_store", "store"]


@pytest.fixture
def directory(monkeypatch):
    """Return a private runtime directory with a short path, which clients find by default."""
    path = Path(tempfile.mkdtemp(prefix="wooly-"))
    monkeypatch.setenv("WOOLY_RUNTIME_DIR", str(path))
    monkeypatch.setenv("WOOLY_LOCK_DIR", str(path))  # stores of tests grant memory of devices with the same name
    monkeypatch.delenv("WOOLY_REDIS_URL", raising=False)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_store(directory):
    """Return a function that starts a store with options (`popen`: of its process); end all after the test."""
    started = []

    def start(*, popen=None, **options):
        started.append(StoreProcess(directory, **options))
        return started[-1].start(**(popen or {}))

    yield start
    for one in reversed(started):
        one.clean_up()


@pytest.fixture
def store(start_store):
    """Start a store."""
    return start_store()


@pytest.fixture
def actor(directory):
    """Return a function that starts client processes, connected unless `connect=False`; end all after the test."""
    made = []

    def make(*, connect=True, name="", autostart=False, env=None, **popen):
        made.append(Actor(env={**os.environ, **(env or {})}, **popen))
        if connect:
            made[-1].connect(directory=str(directory), name=name, autostart=autostart)
        return made[-1]

    yield make
    for one in made:
        one.kill()
