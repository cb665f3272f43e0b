"""Upgrade: the store of another installation replaces the running one, and no client loads a model again."""

from __future__ import annotations

import os
import shutil
import sys
import venv
from pathlib import Path

import pytest
from support.waiting import open_fds, wait_until

import shared_store
from shared_store.base.errors import UpgradeError
from shared_store.client.session import Session

ONE = "a" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]


@pytest.fixture
def installation(tmp_path):
    """Copy the package as version 9.9.9. Returns the environment variables that select the copy."""
    package = tmp_path / "shared_store"
    shutil.copytree(Path(shared_store.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    init = package / "__init__.py"
    text = init.read_text()
    changed = text + '\n__version__ = "9.9.9"\n'
    init.write_text(changed)
    return {"PYTHONPATH": str(tmp_path)}


def test_upgrade_under_readers(kept, actor, installation):
    """The new version serves, the keeper is the same process, and readers keep their bytes and rejoin."""
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    client = kept.client()
    before = client.session.status()
    client.session.upgrade_store(sys.executable, installation)
    after = client.session.status()
    assert (before.store.version, after.store.version) == (shared_store.__version__, "9.9.9")
    assert after.store.pid != before.store.pid
    assert after.keeper.pid == before.keeper.pid == kept.pid
    assert after.keeper.restarts == 0
    assert after.totals.resident_bytes == before.totals.resident_bytes
    assert reader.digests() == reader.expected()
    wait_until(lambda: kept.status().models[0].readers == 1, "the reader to rejoin")
    late = actor()
    assert late.open(key=ONE, publish=False) == "attached"
    kept.kill_store()  # the new keeper restarts stores of its own version
    assert kept.status().store.version == "9.9.9"


def test_three_upgrades_to_the_same_version(kept, actor):
    """The keeper has as many fds after the third upgrade as after the first."""
    actor().publish(key=ONE, model=MODEL)
    client = kept.client()
    seen = []
    python = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    for _ in range(3):
        client.session.upgrade_store(sys.executable, python)
        wait_until(lambda: kept.status().models[0].readers == 1, "the reader to rejoin")
        seen.append(open_fds(kept.pid))
    assert seen[0] == seen[2]


@pytest.mark.parametrize("wooly_less", [False, True], ids=["no interpreter", "no wooly there"])
def test_upgrade_to_an_unusable_installation(kept, actor, tmp_path, wooly_less):
    """The store continues, and the error has the reason."""
    if wooly_less:
        venv.create(tmp_path / "bare", symlinks=True)
    python, environment = str(tmp_path / "bare" / "bin" / "python"), {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    with Session.connect(kept.directory, autostart=False) as session:
        pid = session.store_pid
        with pytest.raises(UpgradeError):
            session.upgrade_store(python, environment)
        assert session.store_pid == pid
    wait_until(lambda: kept.status().keeper.state == "ok", "a keeper")
    assert kept.status().store.pid == pid
    assert kept.status().models[0].readers == 1


def test_upgrade_without_a_keeper(store):
    """A store without a keeper refuses, and the error names the solution."""
    with Session.connect(store.directory, autostart=False) as session, pytest.raises(UpgradeError, match="wooly stop"):
        session.upgrade_store(sys.executable, {})
