"""A keeper or store that reaches its limit of open files goes on, and does later what it could not do then."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
from support.content import blob, content, key, manifest_of
from support.service_manager import ServiceManager
from support.stores import KeptStore
from support.waiting import open_fds, process_state, wait_until

from shared_store.base.manifest import encode
from shared_store.keeper.journal import Journal
from shared_store.memory import MemfdBackend
from shared_store.protocol import keeper_messages
from shared_store.runtime.paths import RuntimePaths

MIB = 1 << 20
MODELS = 30
SEGMENTS = 600
"""Too many to be on the way at once: the kernel has a limit of bytes for each socket."""


@contextlib.contextmanager
def limited(pid, number):
    """Limit a process to descriptors below a number; it keeps those that it has."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, limits[1]))
    try:
        yield
    finally:
        if process_state(pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def many(kept, actor):
    """A keeper that retains many segments of one reader each, and the reader."""
    reader = actor()
    for number in range(MODELS):
        reader.publish(key=key(number), model=[[number, 1000]])
    wait_until(lambda: kept.status().keeper.state == "ok", "the keeper")
    return kept


def restored(kept, pid):
    """Wait for another store with all models; the keeper is the same process."""
    wait_until(lambda: kept.status().store.pid != pid, "another store")
    status = kept.status()
    assert len(status.models) == MODELS
    assert status.keeper.pid == kept.pid
    assert status.totals.resident_bytes == MODELS * 2 * MIB


def test_a_keeper_near_its_limit_restarts_the_store(directory, tmp_path):
    """Sending the state needs no further descriptor for each segment, although the store reads more slowly."""
    manager, blobs = ServiceManager(tmp_path / "notify"), [blob(content(number, 4096)) for number in range(SEGMENTS)]
    for number in range(SEGMENTS):
        manager.stored[f"segment-{number + 1}"] = segment(content(number, 4096))
    manifest = encode(manifest_of(key(1), blobs))
    model = keeper_messages.ModelRecord(key(1), manifest, tuple((number + 1, 0) for number in range(SEGMENTS)))
    holds = [keeper_messages.Hold(keeper_messages.SegmentRecord(n + 1, "cpu", 4096)) for n in range(SEGMENTS)]
    journal = Journal(RuntimePaths(directory).journal)
    journal.rewrite([*holds, keeper_messages.NoteModel(model)])
    journal.close()
    through, fds = manager.through()
    kept = KeptStore(directory)
    try:
        kept.start(through=through, pass_fds=fds, env={**os.environ, **manager.environment})
        assert kept.status().totals.resident_bytes == SEGMENTS * 4096
        with limited(kept.pid, open_fds(kept.pid) + 12):
            pid = kept.kill_store()
            wait_until(lambda: kept.status().store.pid != pid, "another store")
        status = kept.status()
        assert (status.keeper.pid, status.totals.resident_bytes) == (kept.pid, SEGMENTS * 4096)
        assert len(status.models) == 1
    finally:
        kept.clean_up()
        manager.close()


def segment(data):
    """Return a descriptor of a sealed segment with these bytes."""
    backend = MemfdBackend()
    memory = backend.create(len(data))
    os.pwrite(memory.fd.fileno(), data, 0)
    backend.seal(memory)
    return memory.fd.detach()


def test_a_keeper_at_its_limit_restarts_the_store_later(many):
    """It cannot start a process. It retains the models, logs the reason once, and tries until it can."""
    with limited(many.pid, 3):
        pid = many.kill_store()
        wait_until(lambda: "cannot start a store: Too many open files" in many.log(), "the reason in the log")
        assert process_state(many.pid) in {"S", "R"}
    restored(many, pid)
    assert many.log().count("cannot start a store") == 1


def test_a_keeper_of_more_than_a_thousand_descriptors(start_kept, actor):
    """Its descriptors of a store's process have numbers above those that select() can wait for."""
    program = """
import os, sys
for _ in range(1100):
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
os.execv(sys.argv[1], sys.argv[1:])
"""
    kept = start_kept(popen={"through": [sys.executable, "-c", program]})
    reader = actor()
    reader.publish(key=key(1), model=[[1, 1000]])
    pid = kept.kill_store()
    wait_until(lambda: kept.status().store.pid != pid, "another store")
    assert kept.status().keeper.pid == kept.pid


def test_a_store_without_free_descriptors_gets_another_keeper_later(many):
    """Each segment needs a descriptor for the new keeper. The status has the reason until there is one."""
    client = many.client()
    store = client.session.status().store.pid
    with limited(store, 3):
        os.kill(many.pid, signal.SIGKILL)
        many.wait()
        wait_until(lambda: "another cannot be started yet" in str(client.session.status().store.reasons), "the reason")
        assert client.session.status().keeper.state == "gone"
        assert client.session.status().store.state == "degraded"
    wait_until(lambda: client.session.status().keeper.state == "ok", "another keeper")
    assert not [one for one in client.session.status().store.reasons if "keeper" in one]
    keeper = client.session.status().keeper.pid
    assert keeper != many.pid
    pid = many.kill_store()
    wait_until(lambda: many.status().store.pid != pid, "another store")
    assert len(many.status().models) == MODELS
    assert many.status().keeper.pid == keeper


def test_more_descriptors_than_may_be_on_the_way_are_sent_in_pieces():
    """The kernel refuses them until the receiver has read some. Needs a process without CAP_SYS_RESOURCE."""
    program = """
        import os, resource, socket, sys
        from shared_store.keeper.store_process import StoreProcess
        from shared_store.protocol import keeper_messages, wire
        from shared_store.runtime.fds import OwnedFd
        if os.getuid() == 0:
            os.setuid(65533)
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        ours, theirs = socket.socketpair()
        store = StoreProcess(os.getpid(), OwnedFd(os.pidfd_open(os.getpid())), ours)
        fd = os.open("/dev/null", os.O_RDONLY)
        record = keeper_messages.SegmentRecord
        store.send_state([keeper_messages.Hold(record(n, "cpu", 1)) for n in range(200)], lambda _: (fd,))
        refused, received, decoder = 0, 0, wire.Decoder(wire.MAX_FROM_STORE)
        while store.unsent or received < 200:
            refused += bool(store.refused)
            for frame in decoder.feed(*wire.receive(theirs)):
                assert len(frame.fds) == 1
                frame.fds.close()
                received += 1
            store.flush()
        print(received, refused > 0)
        store.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "200 True\n"), done.stderr
