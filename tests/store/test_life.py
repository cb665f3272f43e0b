"""Start and end of a store, and its clients afterwards."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time

import pytest
from support.client import Client
from support.content import key
from support.stores import StoreProcess
from support.waiting import process_state, wait_until

from shared_store.base.errors import StoreUnavailableError
from shared_store.runtime import spawn

MODEL = [[1, 3 << 20], [2, 100]]


def test_a_store_is_ready_in_less_than_half_a_second(directory, record_property, capsys):
    """The time is recorded and printed; the bound only catches an import of something heavy."""
    times = []
    for _ in range(3):
        store = StoreProcess(directory)
        began = time.monotonic()
        store.start()
        times.append(time.monotonic() - began)
        assert store.stop() == 0
    record_property("ready_s", min(times))
    capsys.readouterr()
    with capsys.disabled():
        sys.stdout.write(f" ready in {min(times):.3f} s (best of 3) ")
    assert min(times) < 5


def test_a_store_imports_neither_torch_nor_an_engine(store):
    maps = (store.proc / "maps").read_text()
    assert "libtorch" not in maps
    assert "msgspec" in maps  # the test can see libraries


def test_of_eight_clients_that_find_no_store_one_starts_it(directory, actor):
    processes = [actor(connect=False) for _ in range(8)]
    for process in processes:
        process.begin("connect", directory=str(directory), autostart=True, timeout_s=30.0)
    for process in processes:
        process.finish()
    stores = {process.store_pid() for process in processes}
    assert len(stores) == 1
    for process in processes:
        process.begin("publish", key=key(1), model=MODEL)
    assert sorted(process.finish() for process in processes) == ["attached"] * 7 + ["granted"]
    pid = stores.pop()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: process_state(pid) in {"", "Z"}, "the store to end")
    assert not (directory / "store.sock").exists()


def test_clients_that_connect_while_a_store_ends_get_a_new_one(directory, start_store, actor):
    """The directory is claimed until the old store has ended; the new store starts then, and is not refused."""
    old = start_store()
    process = actor(connect=False)
    os.kill(old.pid, signal.SIGTERM)
    wait_until(lambda: not old.paths.socket.exists(), "the socket to go")
    process.connect(directory=str(directory), autostart=True, timeout_s=30.0)
    new = process.store_pid()
    assert new != old.pid
    os.kill(new, signal.SIGTERM)
    wait_until(lambda: process_state(new) in {"", "Z"}, "the new store to end")


def test_a_process_with_thousands_of_open_files_starts_a_store(directory):
    """Above the limit of `select(2)`: engines open many sockets and libraries."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("this process may not open so many files (ulimit -n)")
    files = [os.dup(0) for _ in range(1100)]
    try:
        pid = spawn.start(directory)
    finally:
        for fd in files:
            os.close(fd)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: process_state(pid) in {"", "Z"}, "the store to end")


def test_without_autostart_no_store_is_an_error_with_the_next_step(directory):
    with pytest.raises(StoreUnavailableError, match="start one with `wooly serve --detach`"):
        Client(directory, autostart=False)
    assert list(directory.iterdir()) == []


def test_the_variable_turns_autostart_off(directory, monkeypatch):
    monkeypatch.setenv("WOOLY_AUTOSTART", "0")
    with pytest.raises(StoreUnavailableError):
        Client(directory, autostart=None)


def test_a_second_store_in_a_directory_is_refused(store, directory):
    code, said = StoreProcess(directory).refused()
    assert code == 3
    assert said.strip() == (
        f"wooly: a store is already running in {directory}; `wooly status` shows it [store_running]"
    )
    assert store.client().status()["store"]["pid"] == store.pid


def test_starting_where_a_store_runs_finds_it(store, directory):
    assert spawn.start(directory) == 0
    assert store.client().store_pid() == store.pid


def test_a_store_that_cannot_start_reports_the_reason(directory):
    """The starting process raises the end of the store's log, without waiting for the time-out."""
    (directory / "store.sock").write_text("in the way")
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"store ended; .*store\.sock is in the way and is not a socket"):
        spawn.start(directory)
    assert time.monotonic() - began < 8


def test_the_socket_of_a_killed_store_is_replaced(start_store, directory):
    old = start_store()
    old.kill()
    assert (directory / "store.sock").exists()
    new = start_store()
    assert new.client().store_pid() == new.pid != old.pid


def test_clients_of_a_killed_store_keep_their_mappings_and_offer_them_to_the_next(start_store, actor):
    old = start_store()
    publisher, reader = actor(), actor()
    publisher.publish(key=key(1), model=MODEL)
    reader.open(key=key(1))
    old.kill()
    for process in (publisher, reader):
        wait_until(lambda process=process: not process.alive(), "the session to notice")
        assert process.digests() == process.expected()
        with pytest.raises(StoreUnavailableError):
            process.status()
    new = start_store()
    for process in (publisher, reader):
        wait_until(process.alive, "the session to come back")
        assert process.store_pid() == new.pid
    newcomer = actor()
    assert newcomer.publish(key=key(1), model=MODEL) == "attached"
    assert newcomer.digests() == reader.digests() == reader.expected()
    assert new.client().status()["models"][0]["readers"] == 3


def test_a_waiting_client_gets_an_error_when_the_store_is_killed(start_store, actor):
    store = start_store()
    publisher, waiter = actor(), actor()
    publisher.open(key=key(1))
    waiter.begin("open", key=key(1))
    client = store.client()
    wait_until(lambda: any(one.role == "waiting" for one in client.session.status().clients), "the wait")
    store.kill()
    with pytest.raises(StoreUnavailableError):
        waiter.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_store_stops_on_a_signal(start_store, actor, number):
    """Exit code 0, no socket, no catalog server; clients notice and keep their mappings."""
    store = start_store()
    reader = actor()
    reader.publish(key=key(1), model=MODEL)
    (catalog,) = wait_until(store.children, "the catalog's server")
    os.kill(store.pid, number)
    assert store.wait() == 0
    assert not store.paths.socket.exists()
    wait_until(lambda: process_state(catalog) in {"", "Z"}, "the catalog's server to end")
    wait_until(lambda: not reader.alive(), "the session to notice")
    assert reader.digests() == reader.expected()


def test_a_client_can_shut_the_store_down(store):
    store.client().session.shutdown_store()
    assert store.wait() == 0


def test_the_catalogs_server_does_not_outlive_a_killed_store(store):
    (catalog,) = wait_until(store.children, "the catalog's server")
    store.kill()
    wait_until(lambda: process_state(catalog) in {"", "Z"}, "the catalog's server to end")


def test_the_node_keeps_its_identity_over_restarts(start_store):
    first = start_store()
    node = first.client().status()["node"]["id"]
    first.stop()
    assert start_store().client().status()["node"]["id"] == node


def test_connecting_to_a_frozen_store_times_out(store):
    """The kernel accepts the connection, and the store never greets."""
    os.kill(store.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        Client(store.directory, autostart=False, timeout_s=0.5)
    assert time.monotonic() - began < 5


def test_a_connection_without_a_message_is_not_an_error(store):
    for _ in range(5):
        assert spawn.answers(store.paths)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(store.paths.socket))
    status = store.client().session.status()
    assert status.counters.protocol_errors == 0
