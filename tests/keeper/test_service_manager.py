"""A keeper under a service manager: notifications, stored fds, and the unit file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.service_manager import ServiceManager
from support.stores import KeptStore
from support.waiting import wait_until

from shared_store.client.session import Session

ONE = "a" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]
UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "wooly.service"


def restarts(code):
    """Whether the unit starts the service again after an exit code (negative: a signal), as systemd.service(5) says."""
    (policy,) = [line.removeprefix("Restart=") for line in UNIT.read_text().splitlines() if line.startswith("Restart=")]
    clean = code == 0 or -code in {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE}
    return {"always": True, "on-failure": not clean, "no": False}[policy]


@pytest.fixture
def manager(tmp_path):
    """A service manager with a notification socket."""
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
def service(directory, manager):
    """Start the service with the stored fds. It ends with the test."""
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


def test_notifications(service, manager, actor):
    """READY, WATCHDOG, one stored fd for each segment, and its removal."""
    service()
    wait_until(lambda: "READY=1" in manager.lines, "READY=1")
    wait_until(lambda: "WATCHDOG=1" in manager.lines, "WATCHDOG=1")
    assert list(manager.stored) == ["listen"]
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    publisher.leave(key=ONE)
    publisher.remove(key=ONE)
    wait_until(lambda: list(manager.stored) == ["listen"], "the segment to be removed")


def test_killed_service_loses_nothing(service, manager, actor):
    """After SIGKILL of keeper, store and client, the stored fds and the journal restore the model."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    first.kill_both()
    publisher.kill()
    waiting = actor(connect=False)
    waiting.begin(
        "connect", directory=str(first.directory)
    )  # the listening socket is the stored one, so the connection is not refused
    again = service()
    waiting.finish()
    assert waiting.open(key=ONE, publish=False) == "attached"
    assert waiting.digests() == waiting.expected()
    assert again.status().totals.resident_bytes > 0


def test_stored_fd_without_a_record(service, manager, actor):
    """Without its record in the journal a stored segment is dropped and removed from the manager, with an event."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    first.kill_both()
    publisher.kill()
    first.paths.journal.unlink()
    again = service()
    assert again.status().totals.resident_bytes == 0
    wait_until(lambda: list(manager.stored) == ["listen"], "the segment to be removed")
    assert "the journal has no record of segment-" in again.log()


def test_stored_fd_that_does_not_match_its_record(service, manager, actor):
    """Another file under a segment's name is dropped with its model, and the next client publishes the model."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    first.kill_both()
    publisher.kill()
    (name,) = set(manager.stored) - {"listen"}
    os.close(manager.stored[name])
    manager.stored[name] = os.open("/dev/null", os.O_RDONLY)
    again = service()
    assert "segment dropped" in again.log()
    late = actor()
    assert late.publish(key=ONE, model=MODEL) == "granted"
    assert late.digests() == late.expected()


def test_stop_means_stopped(service, manager, actor):
    """`wooly stop` leaves nothing for the next start, and ends so that the unit's manager does not restart it."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    publisher.leave(key=ONE)
    with Session.connect(first.directory, autostart=False) as session:
        session.shutdown_store()
    code = first.wait()
    assert not restarts(code)
    assert manager.stored == {}
    assert {path.name for path in first.directory.iterdir()}.isdisjoint({"store.sock", "journal", "journal.new"})
    publisher.kill()
    again = service()  # whoever starts it gets an empty store
    assert again.status().models == ()
    assert again.status().totals.resident_bytes == 0


def test_stop_while_the_manager_does_not_read(service, manager):
    """It ends all the same, within a few seconds."""
    first = service()
    manager.pause()
    with Session.connect(first.directory, autostart=False) as session:
        session.shutdown_store()
    assert not restarts(first.wait())
    manager.resume()


def test_restart_by_the_manager_loses_nothing(service, manager, actor):
    """SIGTERM to keeper and store, as `systemctl restart` sends it: journal, socket and stored fds remain."""
    first = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    publisher.kill()
    for pid in (first.store_pid, first.pid):
        os.kill(pid, signal.SIGTERM)
    first.wait()
    assert len(manager.stored) == 2
    again = service()
    late = actor()
    assert late.open(key=ONE, publish=False) == "attached"
    assert late.digests() == late.expected()
    assert again.status().totals.resident_bytes > 0


def test_a_killed_keeper_is_restarted(service):
    """The unit counts a signal as a failure, as it does an exit code of an error."""
    first = service()
    first.kill_both()
    assert restarts(first.wait())
    assert restarts(1)
    service()


def test_released_memory_is_confirmed_when_the_manager_has_closed_it(service, manager, actor):
    """The manager has a descriptor, too. Until it has closed it, the bytes count as used."""
    kept = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: len(manager.stored) == 2, "the segment to be stored")
    publisher.leave(key=ONE)
    manager.pause()
    publisher.remove(key=ONE)
    assert [device.releasing_bytes for device in kept.status().devices] == [4 << 20]
    manager.resume()
    wait_until(lambda: kept.status().devices[0].releasing_bytes == 0, "the confirmation")
    assert list(manager.stored) == ["listen"]


def test_stores_do_not_inherit_the_variables(service, actor):
    """The manager's variables are for the keeper alone: its stores do not notify the manager."""
    kept = service()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    pid = kept.kill_store()
    wait_until(lambda: publisher.alive() and publisher.store_pid() != pid, "the reader to rejoin")
    environment = Path(f"/proc/{kept.store_pid}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment
    assert b"LISTEN_FDS" not in environment


def test_unit_file(tmp_path):
    """systemd-analyze reports no problem."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "wooly.service"
    unit.write_text(UNIT.read_text().replace("/opt/wooly/bin/wooly", sys.executable))  # commands must exist
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
