"""Activity pages: clients write them without a message, and nothing that they write harms the store."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.descriptors import no_leak_in
from support.rawclient import RawClient
from support.system_calls import FILTER

from shared_store.activity import layout
from shared_store.activity.page import SEALS, make_page
from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd

WORDS = st.integers(0, 2**64 - 1)


def activity_of(client, watcher):
    (row,) = [row for row in watcher.session.status().clients if row.id == client.session.client]
    return row.activity


@pytest.fixture
def reporting(store):
    """A client with a page, its writer, and a function that returns what the store shows."""
    client, watcher, writer = store.client(), store.client(), ActivityWriter()
    client.session.report_activity(writer)
    return writer, lambda: activity_of(client, watcher)


def test_the_status_shows_the_work_of_a_client(reporting):
    writer, shown = reporting
    assert shown() == shown().__class__(False, None, 0, 0)
    writer.begin()
    assert (shown().busy, shown().idle_s) == (True, None)
    writer.end(3, 1)
    first = shown()
    assert (first.busy, first.running, first.waiting) == (True, 3, 1)
    writer.begin()
    assert shown().running == 3  # a step that goes on changes nothing
    writer.end(0, 0)
    last = shown()
    assert (last.busy, last.running, last.waiting) == (False, 0, 0)
    assert 0 <= last.idle_s < 60
    assert shown().idle_s >= last.idle_s


def test_a_client_without_a_page_shows_nothing(store):
    client = store.client()
    assert activity_of(client, client) is None


def test_what_was_written_before_there_was_a_page_is_in_it(store):
    client, writer = store.client(), ActivityWriter()
    writer.begin()
    writer.end(2, 5)
    client.session.report_activity(writer)
    found = activity_of(client, client)
    assert (found.busy, found.running, found.waiting) == (True, 2, 5)


def test_another_page_replaces_the_first(store):
    client = store.client()
    for number in (1, 2):
        writer = ActivityWriter()
        client.session.report_activity(writer)
        writer.end(number, 0)
        assert activity_of(client, client).running == number


def test_pages_end_with_their_clients(start_store, directory):
    """Descriptors and mappings of the store, whose catalog is away: its connections come and go by themselves."""
    store = start_store(redis_url=f"unix://{directory}/away")
    with no_leak_in(store.pid):
        clients = [store.client() for _ in range(5)]
        for client in clients:
            client.session.report_activity(ActivityWriter())
            client.session.report_activity(ActivityWriter())
        for client in clients:
            client.close()
    assert "memfd:activity" not in (store.proc / "maps").read_text()


# Hostile clients.


@pytest.fixture
def raw_page(store):
    """A client's own mapping of its page, with the descriptor, and a function that returns what the store shows."""
    with RawClient(store.paths.socket) as raw:
        raw.send(messages.GetActivityPage(1))
        frame = raw.channel.receive()
        assert isinstance(messages.decode_from_store(frame.payload), messages.PageGranted)
        watcher = store.client()

        def shown():
            (row,) = [row for row in watcher.session.status().clients if row.name == "raw"]
            return row.activity

        with frame.fds, mmap.mmap(frame.fds.filenos()[0], layout.SIZE) as page:
            yield page, frame.fds.filenos()[0], shown


def test_a_page_cannot_be_cut_or_enlarged_or_sealed(raw_page):
    """A page that is cut would end the store with SIGBUS when it reads."""
    _, fd, shown = raw_page
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS
    for size in (0, 8, 2 * layout.SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PermissionError):
        os.posix_fallocate(fd, 0, 2 * layout.SIZE)
    assert shown() is not None


def test_garbage_in_a_page_harms_nobody(raw_page, store):
    page, _, shown = raw_page
    source = random.Random(7)
    for _ in range(50):
        page[:] = source.randbytes(layout.SIZE)
        found = shown()
        assert found is None or max(found.running, found.waiting) <= layout.MOST_REQUESTS
    page[:] = b"\xff" * layout.SIZE
    assert shown() is None
    assert store.client().alive()


@given(WORDS, WORDS, st.integers(1, 2**63))
def test_any_words_decode_to_values_in_range(state, last_use, now):
    found = layout.decode(state, last_use, now)
    if found is not None:
        assert 0 <= found.running <= layout.MOST_REQUESTS
        assert 0 <= found.waiting <= layout.MOST_REQUESTS
        assert found.idle_s is None or 0 <= found.idle_s <= now / 1e9


@given(st.integers(0, 2**70), st.integers(0, 2**70))
def test_a_state_survives_its_word(running, waiting):
    word = layout.state_word(running, waiting)
    assert 0 <= word < 2**64
    found = layout.decode(word, 0, 1)
    most = layout.MOST_REQUESTS
    assert found == (running > 0 or waiting > 0, None, min(running, most), min(waiting, most))


def test_the_documented_offsets():
    """What another program reads from the page."""
    page, fd = make_page()
    writer = ActivityWriter()
    reading = mmap.mmap(fd.fileno(), layout.SIZE, prot=mmap.PROT_READ)
    writer.attach(fd)
    writer.end(3, 5)
    with reading:
        assert int.from_bytes(reading[0:8], "little") == 1
        assert int.from_bytes(reading[8:12], "little") == 5
        assert int.from_bytes(reading[12:16], "little") == 3 | 1 << 31
        assert int.from_bytes(reading[16:24], "little") > 0
        assert not any(reading[24:])
    assert page.read().running == 3


STEPS = (
    """
import ctypes, gc, os, struct, sys
from shared_store.activity.page import make_page
from shared_store.activity.writer import ActivityWriter

page, fd = make_page()
writer = ActivityWriter()
writer.attach(fd)
def steps(count):
    for number in range(count):
        writer.begin()
        writer.end(number & 7, number & 3)
steps(1000)
gc.disable()
"""
    + FILTER
    + """
if sys.argv[1] == "steps":
    steps(100_000)
else:
    os.getppid()
os.write(1, b"done")
os._exit(0)
"""
)


@pytest.mark.parametrize(("what", "result"), [("steps", (0, b"done")), ("a system call", (-signal.SIGSYS, b""))])
def test_a_step_makes_no_system_call(what, result):
    """The kernel kills the process at its first one, as the second case shows."""
    clock = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if platform.machine() == "x86_64" and clock.read_text().strip() not in {"tsc", "kvm-clock", "hyperv_clocksource"}:
        pytest.skip("the clock of this machine cannot be read without a system call (vdso(7))")
    done = subprocess.run([sys.executable, "-c", STEPS, what], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == result, done.stderr


def test_a_descriptor_that_is_no_page_is_refused():
    """A store that sends a file which it can cut could end the client with SIGBUS."""
    writer = ActivityWriter()
    for fd in (os.memfd_create("open", os.MFD_ALLOW_SEALING), os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(ProtocolError):
            writer.attach(OwnedFd(fd))
    writer.end(1, 1)  # goes on without a page
    assert writer.busy
