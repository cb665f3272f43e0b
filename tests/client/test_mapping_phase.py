"""Processes map and unmap the memory of a GPU in turn, and go on without a turn rather than wait long."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading

import pytest
from support.devices import DEVICE
from support.mapping import MappingProcess, map_in_turn
from support.waiting import process_state, wait_until

from shared_store.client.mapping_phase import mapping_phase
from shared_store.memory import MemfdBackend
from shared_store.memory.fake import FakeBackend


@pytest.fixture
def process(store, directory, tmp_path):
    """Start a process that stays inside of a phase."""
    started = []

    def start(device=DEVICE):
        started.append(MappingProcess(directory, device, tmp_path / "journal"))
        started[-1].go()
        started[-1].hear("inside")
        return started[-1]

    assert store.pid
    yield start
    for child in started:
        child.end()


@pytest.fixture
def backend():
    """The device in this process."""
    made = FakeBackend(DEVICE)
    made.asynchronous = True
    return made


def test_two_processes_map_in_turn(store, directory, tmp_path):
    """No phase begins before another ends."""
    assert store.pid
    map_in_turn(directory, DEVICE, tmp_path / "journal")


def test_phases_of_two_devices_do_not_wait_for_each_other(process):
    process()
    process("GPU-other")


def test_a_process_that_is_killed_inside_lets_the_next_begin(process, sessions, backend, caplog):
    victim, session = process(), sessions()
    victim.process.kill()
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 30):
        assert "without waiting" not in caplog.text


def test_a_process_that_is_stopped_inside_holds_up_the_next_until_the_time_out(process, sessions, backend, caplog):
    """The reason is logged, and the session goes on."""
    stopped, session = process(), sessions()
    stopped.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(stopped.process.pid) == "T", "the process to be stopped")
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 0.2):
        assert f"mapping memory of {DEVICE} without waiting for other processes" in caplog.text
        assert "timed_out" in caplog.text
    assert session.alive
    assert session.status().clients
    stopped.process.send_signal(signal.SIGCONT)
    stopped.go()
    assert stopped.process.wait(30) == 0
    caplog.clear()
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 30):
        assert not caplog.text


def test_without_a_store_the_phase_begins_at_once(sessions, store, backend, caplog):
    session = sessions()
    store.stop()
    wait_until(lambda: not session.alive, "the session to end")
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 60):
        assert "no store is connected" in caplog.text


def test_a_store_that_ends_during_a_phase_does_not_fail_it(sessions, store, backend):
    session, mapped = sessions(), []
    with mapping_phase(session, backend):
        store.stop()
        wait_until(lambda: not session.alive, "the session to end")
        mapped.append(True)
    assert mapped


def test_an_error_inside_is_raised_and_ends_the_phase(sessions, backend, caplog):
    with pytest.raises(KeyError), mapping_phase(sessions(), backend):
        raise KeyError
    with caplog.at_level(logging.INFO), mapping_phase(sessions(), backend, 30):
        assert not caplog.text


def test_threads_of_one_session_take_turns_too(sessions, backend, caplog):
    """A session may ask for a turn once."""
    session, inside, most = sessions(), [], []

    def phases():
        for _ in range(10):
            with mapping_phase(session, backend, 30):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    with caplog.at_level(logging.INFO):
        threads = [threading.Thread(target=phases) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1
    assert not caplog.text


def test_host_memory_has_no_phases(sessions):
    """Nothing is asked of the store."""
    session = sessions()
    with contextlib.ExitStack() as both:
        for _ in range(2):
            both.enter_context(mapping_phase(session, MemfdBackend(), 60))
