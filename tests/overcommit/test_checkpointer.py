"""All processes of a workload leave the GPU together, or none does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.file_driver import PlayedDriver

from shared_store.base.errors import DeclinedError, MemoryBackendError
from shared_store.memory.cuda.checkpoint import ProcessState
from shared_store.overcommit.checkpoints import processes
from shared_store.overcommit.checkpoints.checkpointer import Checkpointer

PIDS = (101, 102, 103)


class KilledError(Exception):
    """The checkpointer is killed here."""


class Driver(PlayedDriver):
    """The states that the driver has of processes, which outlive a checkpointer. Refuses what the driver refuses."""

    def __init__(self, failing=frozenset(), killed_at=None):
        self.states = dict.fromkeys(PIDS, ProcessState.RUNNING)
        self.failing = failing
        self.killed_at = killed_at
        self.calls = 0

    def state(self, pid):
        return self.states[pid]

    def _step(self, name, pid, before, after):
        if self.calls == self.killed_at:
            raise KilledError
        self.calls += 1
        if (name, pid) in self.failing:
            raise MemoryBackendError(f"{name} of {pid} fails")
        assert self.states[pid] is before, f"{name} of a process that is {self.states[pid]}"
        self.states[pid] = after


def checkpointer(driver):
    return Checkpointer(driver, lambda: PIDS)


def test_all_processes_leave_and_return_together():
    driver = Driver()
    one = checkpointer(driver)
    one.take_off(1)
    assert set(driver.states.values()) == {ProcessState.CHECKPOINTED}
    one.take_off(1)
    one.bring_back()
    one.bring_back()
    assert set(driver.states.values()) == {ProcessState.RUNNING}


@given(step=st.sampled_from(["lock", "checkpoint"]), pid=st.sampled_from(PIDS))
def test_a_step_that_fails_is_undone(step, pid):
    driver = Driver(failing={(step, pid)})
    one = checkpointer(driver)
    with pytest.raises(DeclinedError):
        one.take_off(1)
    assert set(driver.states.values()) == {ProcessState.RUNNING}
    assert one.pids == ()


def test_a_restore_that_fails_after_a_failed_step_can_be_repeated():
    driver = Driver(failing={("checkpoint", 102), ("restore", 101)})
    one = checkpointer(driver)
    with pytest.raises(MemoryBackendError):
        one.take_off(1)
    driver.failing = set()
    one.bring_back()
    assert set(driver.states.values()) == {ProcessState.RUNNING}


def test_a_restore_that_fails_can_be_repeated():
    driver = Driver()
    one = checkpointer(driver)
    one.take_off(1)
    driver.failing = {("restore", 102)}
    with pytest.raises(MemoryBackendError):
        one.bring_back()
    driver.failing = set()
    one.bring_back()
    assert set(driver.states.values()) == {ProcessState.RUNNING}


@given(st.integers(0, 12))
def test_the_successor_of_a_killed_checkpointer_leaves_all_processes_in_one_state(call):
    driver = Driver(killed_at=call)
    one, remembered = checkpointer(driver), []
    try:
        one.take_off(1, remembered.extend)
        one.bring_back()
    except KilledError:
        driver.killed_at = None
        successor = checkpointer(driver)
        successor.resume(remembered)
        assert set(driver.states.values()) in ({ProcessState.RUNNING}, {ProcessState.CHECKPOINTED})
        successor.bring_back()
    assert set(driver.states.values()) == {ProcessState.RUNNING}


def test_an_unlock_that_fails_can_be_repeated():
    driver = Driver()
    one = checkpointer(driver)
    one.take_off(1)
    driver.failing = {("unlock", 102)}
    with pytest.raises(MemoryBackendError):
        one.bring_back()
    driver.failing = set()
    one.bring_back()
    assert set(driver.states.values()) == {ProcessState.RUNNING}


def test_a_process_that_ended_while_it_was_off_is_left_out():
    driver, ended = Driver(), set()
    one = Checkpointer(driver, lambda: PIDS, lambda pid: pid not in ended)
    one.take_off(1)
    ended.add(102)
    successor = Checkpointer(driver, lambda: PIDS, lambda pid: pid not in ended)
    successor.resume(PIDS)
    successor.bring_back()
    assert driver.states[101] is driver.states[103] is ProcessState.RUNNING


def test_a_workload_without_a_gpu_declines():
    one = Checkpointer(Driver(), list)
    with pytest.raises(DeclinedError, match="no process"):
        one.take_off(1)


def test_processes_that_have_a_device_open_are_found(tmp_path, monkeypatch):
    device = tmp_path / "device0"
    device.touch()
    monkeypatch.setattr(processes, "DEVICE", str(tmp_path / "device"))
    waiting = "import sys; f = open(sys.argv[1]) if len(sys.argv) > 1 else None; print(flush=True); sys.stdin.read()"
    with contextlib.ExitStack() as children:
        started = []
        for arguments in ([str(device)], []):
            child = children.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", waiting, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            child.stdout.readline()
            started.append(child.pid)
        assert processes.with_gpu(os.getpid()) == started[:1]
        assert processes.with_gpu(started[1]) == []
        with device.open():
            assert processes.with_gpu(os.getpid()) == [os.getpid(), started[0]]
            assert processes.with_gpu(started[0]) == [started[0], os.getpid()]


def test_a_process_that_ended_has_no_device_open():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not processes.has_gpu(child.pid)
