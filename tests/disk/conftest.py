"""Fixtures: a store, the command line, and a saved model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.content import blob, content, key, manifest_of
from support.fixtures import actor, directory, start_store
from support.saved import publish
from support.stores import StoreProcess

from shared_store.client.session import Session
from shared_store.disk.save import save_resident
from shared_store.transfer.resident import committed

__all__ = ["actor", "directory", "start_store", "store"]

KEY = key(7)
CONTENTS = [content(1, 3 << 20), content(2, 1000), content(3, 5 << 20), content(2, 1000), b""]


@pytest.fixture
def store(start_store, directory):
    """Start a store whose catalog is unreachable: no test here needs the catalog."""
    return start_store(redis_url=f"unix://{directory}/away")


@pytest.fixture
def session(store, directory):
    """Connect to the store."""
    assert store.pid
    with Session.connect(directory, name="test", autostart=False) as connected:
        yield connected


@pytest.fixture
def wooly(directory):
    """Run a `wooly` command to its end, or start one with `wooly.start`."""
    started = []

    def begin(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "shared_store.cli", *map(str, arguments)],
            env={**os.environ, "WOOLY_RUNTIME_DIR": str(directory), "COLUMNS": "100", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    def run(*arguments, **environment):
        process = begin(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.start = begin
    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


MANIFEST = manifest_of(KEY, [blob(data) for data in CONTENTS], state={"layers.0": {"scale": 0.5, "limit": 1e999}})


@pytest.fixture
def model(session):
    """Publish a model and return its manifest."""
    publish(session, MANIFEST, CONTENTS)
    return MANIFEST


@pytest.fixture(scope="session")
def pristine():
    """Save the model from a store of its own, once for all tests."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as scratch:
        directory = Path(scratch)
        store = StoreProcess(directory, redis_url=f"unix://{directory}/away").start()
        try:
            with Session.connect(directory, autostart=False) as session:
                publish(session, MANIFEST, CONTENTS)
                save_resident(session, committed(session.status().models, KEY), directory / "saved")
        finally:
            store.clean_up()
        yield directory / "saved"


@pytest.fixture
def saved(pristine, tmp_path):
    """Copy the saved model, so that a test can change it. The store does not have it."""
    return shutil.copytree(pristine, tmp_path / "saved")
