"""The embedded server: private, supervised, and ended with the store."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from catalog.conftest import OwnServer, process_ended, wait_until
from catalog.documents import PROGRAMS, blob, expected, model, read, snapshot

from shared_store.base.errors import PathTooLongError
from shared_store.catalog import Catalog, EmbeddedServer

# A store with an embedded server, as a process that can be killed. The server is started from a thread that ends.
STORE = """
import sys, threading
from pathlib import Path
from shared_store.catalog import Catalog, EmbeddedServer
from catalog.documents import snapshot
server = EmbeddedServer(Path(sys.argv[1]))
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
catalog = Catalog(server.url)
catalog.start(snapshot())
assert catalog.flush(20)
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def own(server_directory):
    running = OwnServer(server_directory)
    running.start()
    yield running
    running.stop()


def test_private_and_without_persistence(own, server_directory):
    """A socket of mode 0700, no TCP port, a limit without eviction, no file but socket and log."""
    assert stat.S_IMODE((server_directory / "catalog.sock").stat().st_mode) == 0o700
    assert not [c for c in psutil.Process(own.pid).net_connections(kind="inet") if c.status == "LISTEN"]
    with own.client() as client:
        config = client.config_get("*")
        client.set("some", "data")
    assert config["maxmemory-policy"] == "noeviction"
    assert int(config["maxmemory"]) > 0
    own.stop()
    assert [path.name for path in server_directory.iterdir()] == ["catalog.log"]


def test_killed_server_is_restarted_and_rewritten(own):
    catalog = Catalog(own.url, lease_ttl_s=1.5)
    held = snapshot([model("aa", [blob(1)])])
    catalog.start(held)
    assert catalog.flush(10)
    before = own.pid
    for _ in range(2):
        own.kill()
        own.restart()
        assert catalog.flush(20)
        with own.client() as client:
            assert read(client) == expected(held)
    assert own.pid != before
    catalog.stop()


def test_stop_ends_the_server_for_good(own):
    pid = own.pid
    own.stop()
    assert process_ended(pid)
    assert own.pid is None
    assert not own.answers()


def test_stop_ends_a_server_that_hangs(own):
    pid = own.pid
    own.pause()
    own.stop()
    assert process_ended(pid)


def test_stop_before_start_and_right_after_it(server_directory):
    """Neither hangs, and no server remains."""
    never = EmbeddedServer(server_directory)
    never.stop()
    server = EmbeddedServer(server_directory)
    server.start()
    server.stop()
    assert server.pid is None


def test_server_ends_with_a_killed_store(server_directory):
    """SIGKILL to the store ends the server. The end of the thread that called start() does not."""
    store = subprocess.Popen(
        [sys.executable, "-c", STORE, server_directory], env=PROGRAMS, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        pid = int(store.stdout.readline())
        assert not process_ended(pid)
        os.kill(store.pid, signal.SIGKILL)
        store.wait()
        wait_until(lambda: process_ended(pid), "the server to end with the store")
    finally:
        store.kill()
        store.communicate()


def test_failed_start_is_retried(server_directory, caplog):
    """Without its directory the server cannot start. The log has the reason, and a retry succeeds later."""
    late = server_directory / "late"
    server = OwnServer(late)
    server._embedded.start()
    wait_until(lambda: "No such file" in caplog.text, "the log line")
    late.mkdir()
    wait_until(server.answers, "the server")
    server.stop()


def test_the_longest_path_works(server_directory):
    room = 107 - len(os.fsencode(server_directory)) - len("/") - len("/catalog.sock")
    directory = server_directory / ("d" * room)
    directory.mkdir()
    server = OwnServer(directory)
    assert len(server.url.removeprefix("unix://")) == 107
    server.start()
    server.stop()


def test_a_longer_path_is_refused():
    directory = Path("/run") / ("d" * (108 - len("/run/") - len("/catalog.sock")))
    with pytest.raises(PathTooLongError, match=r"108 bytes.*WOOLY_RUNTIME_DIR"):
        EmbeddedServer(directory)
