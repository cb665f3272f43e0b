"""pip replaces the installation under a running keeper: the next store and the next keeper are of the new version.

Module names that a process of one version starts (``shared_store.daemon``, ``shared_store.keeper``) and their arguments
are an interface between versions. These tests run keeper, store and reader from a directory, replace its contents, and
kill or upgrade the processes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.content import blob, content
from support.stores import KeptStore
from support.waiting import readable, wait_until

import shared_store

ONE = "a" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]
DIGESTS = [blob(content(seed, nbytes)).digest.hex() for seed, nbytes in MODEL]
ROOT = Path(__file__).resolve().parents[2]
BEFORE_LAYERS = "0b48ea0"
"""The last commit before the modules moved into layers. Most modules had other names."""
PROTOCOL_1 = "e634cb3"
"""The last commit whose clients and stores speak protocol 1 only."""


def of_history(commit, site):
    """Unpack the packages of an earlier commit."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "shared_store"], capture_output=True, check=False
    )
    if archive.returncode != 0:
        pytest.skip(f"the history has no commit {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(site, filter="data")


def before_layers(site):
    of_history(BEFORE_LAYERS, site)


def of_protocol_1(site):
    of_history(PROTOCOL_1, site)


def of_this_version(site):
    """Unpack the tested wheel, or copy the package that is tested."""
    wheel = os.environ.get("WOOLY_TESTED_WHEEL")
    if wheel is not None:
        with zipfile.ZipFile(ROOT / wheel) as files:
            files.extractall(site)
        return
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(shared_store.__file__).parent, site / "shared_store", ignore=ignore)


class Installation:
    """A directory with the package, as made by ``pip install --target``."""

    def __init__(self, site, elsewhere):
        self.site = site
        self._elsewhere = elsewhere

    def install(self, unpack, version):
        """Replace the installed version."""
        shutil.rmtree(self.site, ignore_errors=True)
        self.site.mkdir()
        unpack(self.site)
        with (self.site / "shared_store" / "__init__.py").open("a") as init:
            init.write(f'\n__version__ = "{version}"\n')

    @property
    def popen(self):
        """Return arguments for a process that imports from this directory, not from the source tree."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return {"env": {**kept, **self.python}, "cwd": self._elsewhere}

    @property
    def python(self):
        return {"PYTHONPATH": str(self.site), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Reader:
    """A reader process of the installed version."""

    def __init__(self, directory, installation):
        program = Path(__file__).parents[1] / "support" / "installed_reader.py"
        sizes = json.dumps([nbytes for _, nbytes in MODEL])
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(directory), ONE, sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            **installation.popen,
        )

    @property
    def pid(self):
        return self._process.pid

    def report(self):
        """Return the digests of its mappings, and the store that it is connected to."""
        self._process.stdin.write(b"\n")
        assert readable(self._process.stdout, 30.0), "the reader does not answer"
        line = self._process.stdout.readline()
        assert line, "the reader ended"
        return json.loads(line)

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def installation(tmp_path):
    return Installation(tmp_path / "site", tmp_path)


@pytest.fixture
def start_reader(directory, installation):
    started = []

    def start():
        started.append(Reader(directory, installation))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(
    params=[before_layers, of_protocol_1, of_this_version],
    ids=["from before the layers", "from protocol 1", "from this version"],
)
def running(request, directory, installation, actor, start_reader):
    """A keeper, store and reader of version 1.0.0, after version 2.0.0 was installed in the same place."""
    installation.install(request.param, "1.0.0")
    kept = KeptStore(directory)
    try:
        kept.start(**installation.popen)
        publisher = actor()
        publisher.publish(key=ONE, model=MODEL)
        reader = start_reader()
        assert reader.report()["digests"] == DIGESTS
        publisher.kill()
        wait_until(lambda: model(kept).readers == 1, "the publisher to disconnect")
        assert kept.status().store.version == reader.report()["version"] == "1.0.0"
        assert Path(reader.report()["package"]).parent == installation.site
        installation.install(of_this_version, "2.0.0")
        yield kept, reader
    finally:
        kept.clean_up()


def model(kept):
    (found,) = kept.status().models
    return found


def check_new_version(kept, reader, start_reader, before):
    """The model kept its memory and its reader, and a reader of the new version attaches to it."""
    late = start_reader()
    said = late.report()
    assert (said["digests"], said["version"]) == (DIGESTS, "2.0.0")
    wait_until(lambda: reader.report()["alive"] and model(kept).readers == 2, "both readers")
    assert reader.report()["digests"] == DIGESTS
    assert reader.report()["version"] == "1.0.0"
    after = kept.status()
    assert after.totals.resident_bytes == before.totals.resident_bytes
    assert after.counters.publishes == 0  # no client loaded a model
    assert after.keeper.pid == before.keeper.pid
    assert reader.report()["store_pid"] == said["store_pid"] == after.store.pid


def test_store_killed(running, start_reader):
    """The old keeper starts a store of the new version with the state."""
    kept, reader = running
    before = kept.status()
    os.kill(before.store.pid, signal.SIGKILL)
    assert reader.report()["digests"] == DIGESTS
    check_new_version(kept, reader, start_reader, before)
    after = kept.status()
    assert after.store.version == "2.0.0"
    assert after.store.pid != before.store.pid
    assert (after.keeper.restarts, after.keeper.journal) == (1, "ok")


def test_keeper_killed(running, start_reader):
    """The old store starts a keeper of the new version, which starts stores of the new version."""
    kept, reader = running
    old = kept.status()
    kept.kill()
    wait_until(lambda: kept.status().keeper.pid != old.keeper.pid, "another keeper")
    wait_until(lambda: kept.status().keeper.state == "ok", "the keeper to have taken over")
    before = kept.status()
    assert (before.store.pid, before.store.version) == (old.store.pid, "1.0.0")
    os.kill(before.store.pid, signal.SIGKILL)
    check_new_version(kept, reader, start_reader, before)
    assert kept.status().store.version == "2.0.0"


def test_upgrade(running, installation, start_reader):
    """The old keeper becomes one of the new version, and replaces the store."""
    kept, reader = running
    before = kept.status()
    client = kept.client()
    client.session.upgrade_store(sys.executable, installation.python)
    client.close()
    check_new_version(kept, reader, start_reader, before)
    assert kept.status().store.version == "2.0.0"
    os.kill(kept.status().store.pid, signal.SIGKILL)
    wait_until(lambda: kept.status().keeper.restarts == 1, "the next store")
    assert kept.status().store.version == "2.0.0"


class Load:
    """A process of an installed version that makes requests without a pause."""

    def __init__(self, directory, installation):
        program = Path(__file__).parents[1] / "support" / "installed_load.py"
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(directory), ONE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **installation.popen,
        )
        assert self._process.stdout.readline() == b"ready\n"

    def end(self):
        """Stop it. Returns what it counted."""
        said, _ = self._process.communicate(timeout=60)
        return json.loads(said)

    def kill(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start_load(directory, tmp_path):
    """Return a function that starts a load of a version, each from a directory of its own."""
    started = []

    def start(unpack):
        site = Installation(tmp_path / f"site {len(started)}", tmp_path)
        site.install(unpack, "3.0.0")
        started.append(Load(directory, site))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_upgrade_under_load(running, installation, start_load, start_reader):
    """Clients of protocol 1 and of this version go on over the upgrade, with each of the two stores."""
    kept, reader = running
    before = kept.status()
    loads = [start_load(of_protocol_1), start_load(of_this_version), start_load(of_this_version)]
    wait_until(lambda: kept.status().counters.attaches > before.counters.attaches + 60, "rounds with the old store")
    client = kept.client()
    client.session.upgrade_store(sys.executable, installation.python)
    client.close()
    wait_until(lambda: kept.status().counters.attaches > 60, "rounds with the new store")
    said = [load.end() for load in loads]
    assert [one["errors"] for one in said] == [[], [], []]
    assert all(set(one["stores"]) == {before.store.pid, kept.status().store.pid} for one in said), said
    wait_until(lambda: model(kept).readers == 1, "the loads to disconnect")
    check_new_version(kept, reader, start_reader, before)
