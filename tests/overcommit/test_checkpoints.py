"""Swapped workloads leave their GPU as whole processes: real processes, stores and helpers over a driver of files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.file_driver import FileDriver
from support.holders import STAYS
from support.stores import KeptStore, StoreProcess
from support.waiting import wait_until

from shared_store.client.session import Session
from shared_store.memory.cuda.checkpoint import ProcessState

MIB = 1 << 20
NBYTES = 4 * MIB
SETTINGS = {
    "budget": {"cpu": NBYTES * 3 // 2},
    "vram_reserve": 0,
    "min_resident_s": 0.0,
    "turn_s": 0.0,
    "deep_after_s": 0.05,
}


pytestmark = pytest.mark.usefixtures("locks", "driver")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver that sees a device of this test."""
    site = Path(__file__).parent.parent / "support" / "driver_site"
    monkeypatch.setenv("WOOLY_TEST_DRIVER", str(tmp_path))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(site), str(site.parent.parent), os.environ.get("PYTHONPATH", "")])
    )
    (tmp_path / "device0").touch()
    return FileDriver(tmp_path)


@pytest.fixture
def settings():
    return SETTINGS


@pytest.fixture
def nbytes():
    return NBYTES


@pytest.fixture
def workloads(workloads, directory, driver):
    """Return a function that starts workload processes with helpers."""

    def make(name, *, start=True, helper=True):
        one = workloads(name, start=False)
        if helper:
            one.deep(directory=str(directory), device=str(driver.directory / "device0"))
        if start:
            one.start()
        return one

    return make


def listed(directory, name):
    with Session.connect(directory, name="test", autostart=False) as session:
        return next((one for one in session.status().workloads if one.name == name), None)


def wait_for(directory, name, state):
    wait_until(lambda: (one := listed(directory, name)) is not None and one.state == state, f"{name}: {state}", 30.0)


def private(directory, name):
    (memory,) = listed(directory, name).memory
    return memory.private


def last_call(driver):
    """The last call, and the pid of the helper that made it."""
    at = driver.directory / "at"
    return at.read_text().split() if at.exists() else ["", "0"]


def helper_of(driver):
    return int(last_call(driver)[1])


def test_a_swapped_workload_leaves_its_gpu_and_returns_for_a_request(stores, workloads, directory, driver):
    stores()
    first, second = workloads("first"), workloads("second")
    wait_for(directory, "first", "checkpointed")
    assert driver.state(first.pid) is ProcessState.CHECKPOINTED
    assert private(directory, "first") == 0
    assert driver.state(second.pid) is ProcessState.RUNNING
    assert first.use()
    assert driver.state(first.pid) is ProcessState.RUNNING
    assert private(directory, "first") >= NBYTES + STAYS
    wait_for(directory, "second", "checkpointed")
    assert second.use()


def test_one_that_is_asleep_or_has_no_helper_stays_on_its_gpu(stores, workloads, directory):
    stores()
    asleep, _ = workloads("asleep"), workloads("without", helper=False)
    wait_for(directory, "asleep", "checkpointed")
    assert asleep.use()
    asleep.sleep()
    wait_for(directory, "without", "swapped")
    third = workloads("third")
    workloads("fourth")
    wait_for(directory, "third", "checkpointed")  # it was swapped after them
    assert (listed(directory, "asleep").state, listed(directory, "without").state) == ("swapped", "swapped")
    assert third.use()


def test_a_start_under_pressure_takes_workloads_off_their_gpu(stores, workloads, directory):
    """Without the start, nothing is checkpointed for half an hour."""
    stores(deep_after_s=1800.0, budget={"cpu": NBYTES + STAYS + STAYS // 2})
    first = workloads("first")
    second = workloads("second")
    assert listed(directory, "first").state == "swapped"
    third = workloads("third")  # what stays of the first one was in its way
    assert listed(directory, "first").state == "checkpointed"
    assert (second.held(), third.held()) == (0, NBYTES)
    for one in (second, third):
        one.kill()
    assert first.use()


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_checkpoint_that_fails_changes_nothing(stores, workloads, directory, driver, call):
    stores()
    driver.mark("fail", call)
    first, second = workloads("first"), workloads("second")

    last = "lock" if call == "lock" else "unlock"
    wait_until(lambda: last_call(driver)[0] == last, "the checkpoint to be undone")
    wait_until(lambda: driver.state(first.pid) is ProcessState.RUNNING, "the process to be unlocked")
    assert listed(directory, "first").state == "swapped"
    assert first.use()
    assert second.use()


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
def test_a_helper_that_is_killed_at_any_step_is_replaced(stores, workloads, directory, driver, call):
    stores()
    first = workloads("first")
    if call in {"lock", "checkpoint"}:
        driver.mark("stop", call)
        workloads("second")
    else:
        workloads("second")
        wait_for(directory, "first", "checkpointed")
        driver.mark("stop", call)
        first.begin("use")
    wait_until(lambda: last_call(driver)[0] == call, call)
    os.kill(helper_of(driver), signal.SIGKILL)
    driver.unmark("stop")
    if call in {"lock", "checkpoint"}:
        assert first.use()
    else:
        assert first.finish()
    assert driver.state(first.pid) is ProcessState.RUNNING
    wait_for(directory, "first", "resident")


@pytest.mark.parametrize("kind", [KeptStore, StoreProcess])
def test_a_restarted_store_learns_what_is_off_its_gpu(stores, workloads, directory, kind):
    store = stores(kind)
    first, second = workloads("first"), workloads("second")
    wait_for(directory, "first", "checkpointed")
    if kind is KeptStore:
        os.kill(store.store_pid, signal.SIGKILL)
    else:
        store.kill()
        stores()
    wait_for(directory, "first", "checkpointed")
    assert first.use()
    assert second.use()


def test_the_helper_ends_with_its_workload(stores, workloads, directory, driver):
    stores()
    first = workloads("first")
    workloads("second")
    wait_for(directory, "first", "checkpointed")
    helper = helper_of(driver)
    first.kill()
    wait_until(lambda: not Path(f"/proc/{helper}").exists(), "the end of the helper")
    wait_until(lambda: listed(directory, "first") is None, "the end of the workload")
