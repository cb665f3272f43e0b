"""The workload's side of the arbiter, which the test plays: what it writes, when it rings, and when steps may begin."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.arbiters import Gated
from support.programs import start_program
from support.system_calls import FILTER
from support.waiting import readable, wait_until

from shared_store.base.errors import ProtocolError
from shared_store.compute import bell, layout
from shared_store.compute.page import SEALS, free_words, make_page, map_page
from shared_store.runtime.fds import OwnedFd

STATE, BEGUN, ENDED, BUSY, BUSY_SINCE, HELD, HELD_SINCE = range(1, 8)
UNTIL, ALLOWED, CONTENDED, SHORT, LOOKED = range(16, 21)


class Played:
    """A workload, and its arbiter as the test plays it."""

    def __init__(self):
        self.workload = Gated()
        self.gate = self.workload.gate
        self.socket = None

    def attach(self):
        page = make_page()
        ours, theirs = socket.socketpair()
        before, self.socket = self.socket, ours
        self.workload.attach(page, OwnedFd(theirs.detach()))
        if before is not None:
            before.close()
        assert self.rings() == 1  # once at the beginning
        return self

    @property
    def words(self):
        return self.workload.words

    def rings(self):
        """How often the workload rang since the last call."""
        found = 0
        while readable(self.socket, 0):
            data = self.socket.recv(4096)
            if not data:
                break
            found += len(data)
        return found

    def ring(self):
        self.socket.send(b"\0")

    def close_socket(self):
        if self.socket is not None:
            self.socket.close()

    def close(self):
        self.workload.close()
        self.close_socket()


@pytest.fixture
def played():
    made = Played()
    yield made
    made.close()


# Without an arbiter.


def test_without_an_arbiter_all_steps_may_begin(played):
    gate = played.gate
    assert not gate.attached
    assert gate.may_begin()
    assert gate.wait(0)
    assert not gate.short
    gate.work(has=True)
    gate.hold()
    gate.begin()
    gate.end()
    gate.close()
    assert gate.may_begin()


def test_what_happened_before_is_in_the_page(played):
    gate = played.gate
    gate.work(has=True)
    gate.begin()
    gate.end()
    gate.begin()
    gate.begin()
    words = played.attach().words
    assert words[STATE] == layout.WORKING | 2
    assert (words[BEGUN], words[ENDED]) == (3, 1)
    assert words[BUSY_SINCE] > 0
    gate.end(1)
    gate.end()
    assert (words[STATE], words[ENDED], words[BUSY_SINCE]) == (layout.WORKING, 3, 0)
    assert words[BUSY] > 0
    gate.work(has=False)
    assert words[STATE] == 0


def test_a_hold_lasts_until_a_step_begins_or_work_ends(played):
    gate, words = played.gate, played.attach().words
    gate.work(has=True)
    gate.hold()
    since = words[HELD_SINCE]
    gate.hold()
    assert words[HELD_SINCE] == since > 0
    gate.begin()
    assert words[HELD_SINCE] == 0
    held = words[HELD]
    assert held > 0
    gate.end()
    gate.hold()
    gate.work(has=False)
    assert words[HELD_SINCE] == 0
    assert words[HELD] > held


# With one.


def test_a_held_workload_waits_until_it_may_begin(played):
    gate, words = played.gate, played.attach().words
    words[UNTIL] = 0
    assert not gate.may_begin()
    assert not gate.wait(0.01)
    threading.Timer(0.05, lambda: (words.__setitem__(UNTIL, layout.FREE), played.ring())).start()
    assert gate.wait(30)
    assert played.workload.changed.wait(30)


def test_a_byte_that_changes_nothing_lets_no_step_begin(played):
    gate, words = played.gate, played.attach().words
    words[UNTIL] = 0
    gate.hold()
    before = played.workload.changes
    played.ring()
    wait_until(lambda: not _unread(played.socket), "the byte to be read")
    assert not gate.wait(0.01)
    assert played.workload.changes == before


def _unread(sock):
    """Bytes that the other end has not read yet (`SIOCOUTQ` of `unix(7)`)."""
    return int.from_bytes(fcntl.ioctl(sock, 0x5411, bytes(4)), sys.byteorder)


def test_a_turn_ends_at_its_time(played):
    gate, words = played.gate, played.attach().words
    words[UNTIL] = time.monotonic_ns() + 10**10
    assert gate.may_begin()
    words[UNTIL] = time.monotonic_ns() - 1
    assert not gate.may_begin()


def test_one_step_may_begin_where_one_is_allowed(played):
    gate, words = played.gate, played.attach().words
    gate.begin()
    gate.end()
    words[UNTIL], words[ALLOWED] = 0, words[BEGUN] + 1
    assert gate.may_begin()
    gate.begin()
    assert not gate.may_begin()


def test_steps_should_be_short_before_a_time(played):
    gate, words = played.gate, played.attach().words
    for until, short in ((layout.FREE, True), (0, False), (time.monotonic_ns() + 10**10, True), (1, False)):
        words[SHORT] = until
        assert gate.short == short


def test_it_rings_when_the_last_batch_ends_after_its_work(played):
    """Requests were aborted meanwhile: others were still waiting for the device."""
    gate, words = played.gate, played.attach().words
    words[layout.CONTENDED_WORD] = 1
    gate.work(has=True)
    gate.begin()
    gate.begin()
    gate.work(has=False)
    assert played.rings() == 2  # work begins, work ends
    gate.end(1)
    assert played.rings() == 0
    gate.end()
    assert played.rings() == 1


def test_it_rings_only_while_others_share_a_device(played):
    gate, words = played.gate, played.attach().words
    for _ in range(3):
        gate.work(has=True)
        gate.begin()
        gate.end()
        gate.work(has=False)
    assert played.rings() == 0
    words[CONTENDED] = 1
    gate.work(has=True)
    assert played.rings() == 1  # work begins
    gate.work(has=True)
    for _ in range(3):
        gate.begin()
        gate.begin()
        gate.end(1)
        gate.end()
    assert played.rings() == 0  # it is free
    gate.begin()
    gate.begin()
    words[UNTIL] = 0
    gate.end(1)
    assert played.rings() == 0
    gate.end()
    assert played.rings() == 1  # it is held, and nothing is in flight any more
    gate.hold()
    gate.hold()
    assert played.rings() == 1  # it waits
    gate.work(has=False)
    gate.work(has=False)
    assert played.rings() == 1  # work ends


def test_an_arbiter_that_reads_nothing_blocks_no_step(played):
    gate, words = played.gate, played.attach().words
    words[CONTENDED] = 1
    words[UNTIL] = 0
    for _ in range(5000):
        gate.begin()
        gate.end()
    assert words[ENDED] == 5000


def test_the_end_of_the_arbiter_frees_steps_once_and_for_all(played, caplog):
    gate, words = played.gate, played.attach().words
    words[UNTIL] = 0
    gate.work(has=True)
    waiting = threading.Thread(target=gate.wait)
    waiting.start()
    wait_until(lambda: words[HELD_SINCE], "the step to wait")
    played.close_socket()
    assert played.workload.lost.wait(30)
    waiting.join(30)
    assert not waiting.is_alive()
    assert gate.may_begin()
    assert not gate.attached
    assert not gate.short
    assert played.workload.losses == 1
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    words = played.attach().words
    assert words[STATE] == layout.WORKING
    words[UNTIL] = 0
    assert not gate.may_begin()


def test_an_arbiter_that_does_not_look_is_gone_for_a_held_workload(played, monkeypatch):
    monkeypatch.setattr(bell, "LOOK_S", 0.01)
    gate, words = played.gate, played.attach().words
    words[UNTIL] = 0
    gate.hold()
    assert played.workload.lost.wait(30)
    assert gate.may_begin()


def test_an_arbiter_that_looks_is_obeyed(played, monkeypatch):
    monkeypatch.setattr(bell, "LOOK_S", 0.005)
    words = played.attach().words
    words[UNTIL] = 0
    looking, over = threading.Event(), threading.Event()

    def look():
        while not over.is_set():
            words[LOOKED] += 1
            looking.set()
            over.wait(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    assert looking.wait(30)
    assert not played.gate.wait(0.3)
    over.set()
    thread.join()
    assert played.workload.lost.wait(30)  # now it does not look any more


def test_an_arbiter_is_not_watched_by_a_workload_that_is_not_held(played, monkeypatch):
    """It would cost an idle machine its sleep."""
    monkeypatch.setattr(bell, "LOOK_S", 0.001)
    played.attach()
    assert not played.workload.lost.wait(0.2)


def test_another_arbiter_replaces_the_first(played):
    gate = played.gate
    first, second = played.attach().words, played.attach().words
    first[UNTIL] = 0
    assert gate.may_begin()
    second[UNTIL] = 0
    assert not gate.may_begin()
    assert not played.workload.losses


def test_a_closed_gate_is_free_and_takes_no_arbiter(played):
    gate, words = played.gate, played.attach().words
    words[UNTIL] = 0
    gate.close()
    gate.close()
    assert gate.may_begin()
    page = make_page()
    ours, theirs = socket.socketpair()
    with ours:
        played.workload.attach(page, OwnedFd(theirs.detach()))
        assert not gate.attached
        wait_until(lambda: ours.recv(4096) == b"" or None, "the other end to be closed")
    assert not played.workload.losses


def test_descriptors_that_are_something_else_are_refused(played):
    for page, sock in (("page", "page"), ("other", "socket"), ("socket", "socket"), ("page", "other")):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            made = {
                "page": make_page,
                "socket": lambda theirs=theirs: OwnedFd(os.dup(theirs.fileno())),
                "other": lambda: OwnedFd(os.memfd_create("other", os.MFD_ALLOW_SEALING)),
            }
            with pytest.raises(ProtocolError):
                played.gate.attach(made[page](), made[sock](), lambda: None)
    assert not played.gate.attached
    assert played.gate.may_begin()


def test_an_error_of_the_workload_does_not_end_the_listening(played):
    gate, words = played.gate, played.attach().words
    calls = []

    def fail():
        calls.append(1)
        raise RuntimeError

    gate._changed = fail
    for number in (1, 2):
        played.ring()
        wait_until(lambda number=number: len(calls) >= number, "the workload to be told")
    words[UNTIL] = 0
    assert not gate.may_begin()


FORKING = """
import os, signal, socket, sys, time
from support.arbiters import Gated
from shared_store.compute.page import make_page, map_page
from shared_store.runtime.fds import OwnedFd

page = make_page()
words = map_page(page.dup())
ours, theirs = socket.socketpair()
workload = Gated().attach(page, OwnedFd(theirs.detach()))
workload.gate.begin()
words[16] = 0
child = os.fork()
if not child:
    gate = workload.gate
    assert gate.may_begin() and not gate.attached
    gate.begin()
    gate.end()
    ours.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
assert words[1:4].tolist() == [1, 1, 0]
assert not workload.gate.may_begin()
workload.close()
"""


def test_a_forked_child_leaves_the_page_to_its_parent():
    process = start_program(FORKING)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


# The page.


def test_a_page_cannot_be_cut_or_enlarged_or_sealed():
    with make_page() as fd:
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) == SEALS
        for size in (0, 8, 2 * layout.SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd.fileno(), size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_new_page_is_free():
    words = map_page(make_page())
    assert words.tolist() == free_words().tolist()
    assert (words[0], words[UNTIL]) == (1, layout.FREE)
    assert [word for number, word in enumerate(words) if number not in {0, UNTIL}] == [0] * 510


def test_a_page_of_another_version_is_refused():
    with make_page() as fd:
        os.pwrite(fd.fileno(), bytes([9]), 0)
        with pytest.raises(ProtocolError, match="layout 9"):
            map_page(fd.dup())


@given(st.lists(st.tuples(st.sampled_from(["work", "rest", "hold", "begin", "end"]), st.integers(0, 3)), max_size=30))
def test_the_page_says_what_happened_whatever_it_is(calls):
    workload = Gated()
    page = make_page()
    ours, theirs = socket.socketpair()
    with ours:
        gate, words = workload.gate, workload.attach(page, OwnedFd(theirs.detach())).words
        begun = ended = in_flight = busy = held = 0
        working = holds = False
        for call, number in calls:
            if call in {"work", "rest"}:
                gate.work(has=call == "work")
                holds = holds and call == "work"
                working = call == "work"
            elif call == "hold":
                gate.hold()
                holds = True
            elif call == "begin":
                gate.begin()
                begun, in_flight, holds = begun + 1, in_flight + 1, False
            else:
                gate.end(number)
                ended, in_flight = ended + 1, number
            assert words[STATE] == (layout.WORKING if working else 0) | in_flight
            assert (words[BEGUN], words[ENDED]) == (begun, ended)
            assert bool(words[BUSY_SINCE]) == bool(in_flight)
            assert bool(words[HELD_SINCE]) == holds
            assert words[BUSY] >= busy
            assert words[HELD] >= held
            busy, held = words[BUSY], words[HELD]
        workload.close()


STEPS = (
    """
import ctypes, gc, os, socket, struct, sys
from support.arbiters import Gated
from shared_store.compute.page import make_page
from shared_store.runtime.fds import OwnedFd

ours, theirs = socket.socketpair()
workload = Gated().attach(make_page(), OwnedFd(theirs.detach()))
ours.recv(16)
gate = workload.gate
workload.words[18] = sys.argv[1] == "held"
def steps(count):
    for number in range(count):
        gate.work(has=True)
        if gate.may_begin():
            gate.begin()
        gate.short
        gate.end(0)
steps(1000)
gc.disable()
workload.words[16] = (1 << 64) - 1 if sys.argv[1] == "free" else 0
"""
    + FILTER
    + """
steps(100_000)
os.write(1, b"done")
os._exit(0)
"""
)


@pytest.mark.parametrize(("what", "result"), [("free", (0, "done")), ("held", (-signal.SIGSYS, ""))])
def test_a_step_makes_no_system_call_unless_it_is_held_beside_others(what, result):
    """The kernel kills the process at its first one, as the second case shows, which rings."""
    clock = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if platform.machine() == "x86_64" and clock.read_text().strip() not in {"tsc", "kvm-clock", "hyperv_clocksource"}:
        pytest.skip("the clock of this machine cannot be read without a system call (vdso(7))")
    process = start_program(STEPS, what)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == result, err
