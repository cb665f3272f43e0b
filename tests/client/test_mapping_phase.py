"""Processes map and unmap the memory of a GPU in turn, and go on without a turn rather than wait long."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading

import pytest
from support.devices import DEVICE
from support.waiting import process_state, readable, wait_until

from shared_store.client.mapping_phase import mapping_phase
from shared_store.memory import MemfdBackend
from shared_store.memory.fake import FakeBackend

_ROUNDS = 20
_PROCESS = """
import os, sys, time
from pathlib import Path
from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Access, Mapping
from shared_store.memory.fake import FakeBackend

directory, device, journal, how = sys.argv[1:]
backend = FakeBackend(device)
backend.asynchronous = True
log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
tell = lambda what: os.write(log, f"{what} {os.getpid()}\\n".encode())
with Session.connect(Path(directory), autostart=False) as session:
    print("connected", flush=True)
    sys.stdin.readline()
    for _ in range(ROUNDS if how == "rounds" else 1):
        with mapping_phase(session, backend, 60):
            tell("begin")
            with Mapping(backend, backend.create(1 << 20)) as mapping:
                mapping.map(Access.WRITE)
                time.sleep(0.002)  # longer than the switch to another process
            if how == "stay":
                print("inside", flush=True)
                sys.stdin.readline()
            tell("end")
""".replace("ROUNDS", str(_ROUNDS))


@pytest.fixture
def process(store, directory, tmp_path):
    """Start a process that maps in phases: in `rounds`, or once to `stay` inside. It begins with `go`."""
    started = []

    def start(how="rounds", device=DEVICE):
        command = [sys.executable, "-c", _PROCESS, str(directory), device, str(tmp_path / "journal"), how]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        started.append(child)
        hear(child, "connected")
        return child

    assert store.pid
    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def hear(child, word):
    assert readable(child.stdout, 30)
    assert child.stdout.readline() == f"{word}\n"


def go(child):
    child.stdin.write("go\n")


@pytest.fixture
def backend():
    """The device in this process."""
    made = FakeBackend(DEVICE)
    made.asynchronous = True
    return made


def test_two_processes_map_in_turn(process, tmp_path):
    """No phase begins before another ends."""
    children = [process(), process()]
    for child in children:
        go(child)
    for child in children:
        assert child.wait(30) == 0
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len(lines) == 2 * 2 * _ROUNDS
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert all((first.split()[0], second) == ("begin", f"end {first.split()[1]}") for first, second in pairs), lines
    assert len({first for first, _ in pairs}) == 2


def test_phases_of_two_devices_do_not_wait_for_each_other(process):
    one, other = process("stay"), process("stay", device="GPU-other")
    for child in (one, other):
        go(child)
        hear(child, "inside")


def test_a_process_that_is_killed_inside_lets_the_next_begin(process, sessions, backend, caplog):
    victim, session = process("stay"), sessions()
    go(victim)
    hear(victim, "inside")
    victim.kill()
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 30):
        assert "without waiting" not in caplog.text


def test_a_process_that_is_stopped_inside_holds_up_the_next_until_the_time_out(process, sessions, backend, caplog):
    """The reason is logged, and the session goes on."""
    stopped, session = process("stay"), sessions()
    go(stopped)
    hear(stopped, "inside")
    stopped.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(stopped.pid) == "T", "the process to be stopped")
    with caplog.at_level(logging.INFO), mapping_phase(session, backend, 0.2):
        assert f"mapping memory of {DEVICE} without waiting for other processes" in caplog.text
        assert "timed_out" in caplog.text
    assert session.alive
    assert session.status().clients
    stopped.send_signal(signal.SIGCONT)
    go(stopped)
    assert stopped.wait(30) == 0
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
