"""Under a service manager: what it is told, and what comes back from it; and the unit file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.service_manager import ServiceManager
from support.stores import KeptStore
from support.waiting import wait_until

ONE = "a" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]
UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "wooly.service"


@pytest.fixture
def manager(tmp_path):
    """A service manager that listens."""
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
def service(directory, manager):
    """Start the service, with what the manager kept; ended with the test."""
    started = []

    def start():
        through, fds = manager.through()
        started.append(KeptStore(directory))
        env = {**os.environ, **manager.environment}
        return started[-1].start(through=through, pass_fds=fds, env=env)

    yield start
    for one in started[:-1]:
        one.kill()
    for one in started[-1:]:
        one.clean_up()


def test_what_the_manager_is_told(service, manager, actor):
    """Ready, alive, an fd for each segment under a name of its own, and that a segment is gone."""
    service()
    wait_until(lambda: "READY=1" in manager.told, "readiness")
    wait_until(lambda: "WATCHDOG=1" in manager.told, "a sign of life")
    assert list(manager.kept) == ["listen"]
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.kept) == 2, "the segment to be kept")
    publisher.leave(key=ONE)
    publisher.remove(key=ONE)
    wait_until(lambda: list(manager.kept) == ["listen"], "the segment to be kept no more")


def test_killed_service_loses_nothing(service, manager, actor):
    """Keeper and store are killed and no client lives: the fds come from the manager, the rest from the journal."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.kept) == 2, "the segment to be kept")
    first.kill_both()
    publisher.kill()
    waiting = actor(connect=False)
    waiting.begin("connect", directory=str(first.directory))  # the socket is the one of before: it is not refused
    again = service()
    waiting.finish()
    assert waiting.open(key=ONE, publish=False) == "attached"
    assert waiting.digests() == waiting.expected()
    assert again.status().totals.resident_bytes > 0


def test_fd_that_the_journal_does_not_know(service, manager, actor):
    """Without the journal nobody knows what a segment is: it is dropped, in the store, with the manager, and told."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.kept) == 2, "the segment to be kept")
    first.kill_both()
    publisher.kill()
    first.paths.journal.unlink()
    again = service()
    assert again.status().totals.resident_bytes == 0
    wait_until(lambda: list(manager.kept) == ["listen"], "the segment to be kept no more")
    assert "the journal has no record of segment-" in again.log()


def test_fd_that_is_not_what_the_journal_says(service, manager, actor):
    """A file under a segment's name is dropped, and the model with it; the next who opens it publishes."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.kept) == 2, "the segment to be kept")
    first.kill_both()
    publisher.kill()
    (name,) = set(manager.kept) - {"listen"}
    os.close(manager.kept[name])
    manager.kept[name] = os.open("/dev/null", os.O_RDONLY)
    again = service()
    assert "segment dropped" in again.log()
    late = actor()
    assert late.publish(key=ONE, model=MODEL) == "granted"
    assert late.digests() == late.expected()


def test_variables_are_the_keepers_alone(service, actor):
    """The manager's variables are for the keeper alone: the stores that it starts do not talk to it."""
    kept = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    pid = kept.kill_store()
    wait_until(lambda: publisher.alive() and publisher.store_pid() != pid, "the reader to be back")
    environment = Path(f"/proc/{kept.store_pid}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment
    assert b"LISTEN_FDS" not in environment


def test_unit_file(tmp_path):
    """Systemd finds nothing wrong with it."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "wooly.service"
    unit.write_text(UNIT.read_text().replace("/opt/wooly/bin/wooly", sys.executable))  # commands must exist
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
