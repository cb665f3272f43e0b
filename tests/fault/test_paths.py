"""Runtime directories and sockets that cannot be used or trusted: refused by store and client, with the next step."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.client import Client
from support.stores import StoreProcess

from shared_store.base import envs
from shared_store.base.errors import ConfigError, PathTooLongError, StoreUnavailableError, UnsafePathError
from shared_store.runtime import paths

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def refused_by_both(directory, error, text):
    """Preparing it raises, and a store process says so and exits with the error's code."""
    with pytest.raises(error, match=text):
        paths.prepare(directory)
    code, said = StoreProcess(directory).refused()
    assert code == error.exit_code
    assert f"[{error.code}]" in said
    assert "Traceback" not in said


def test_a_runtime_directory_that_is_a_link(directory):
    (directory / "real").mkdir(mode=0o700)
    (directory / "link").symlink_to(directory / "real")
    refused_by_both(directory / "link", UnsafePathError, "links are not followed")
    assert list((directory / "real").iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o711, 0o777])
def test_a_runtime_directory_that_lets_others_in(directory, mode):
    directory.chmod(mode)
    refused_by_both(directory, UnsafePathError, f"mode {mode:04o}, which lets others in; run: chmod 700")


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o751])
def test_a_runtime_directory_that_an_earlier_store_shared_is_closed_again(directory, mode):
    """What a store gave its directory for a group or for allowed users, the next one takes back."""
    directory.chmod(mode)
    paths.prepare(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_runtime_directory_of_somebody_else(directory):
    os.chown(directory, NOBODY, NOBODY)
    refused_by_both(directory, UnsafePathError, f"belongs to uid {NOBODY}, not to uid 0")


def test_a_runtime_directory_that_is_a_file(directory):
    (directory / "file").touch()
    refused_by_both(directory / "file", ConfigError, "cannot create the runtime directory")
    with pytest.raises(UnsafePathError, match="is not a directory"):
        paths.locate(directory / "file")


def test_a_runtime_directory_with_too_long_a_path(directory):
    long = directory / ("d" * 100)
    refused_by_both(long, PathTooLongError, "the kernel allows 107; set WOOLY_RUNTIME_DIR to a shorter directory")
    with pytest.raises(PathTooLongError):
        Client(long)


def test_the_longest_path_that_is_possible(directory):
    """The bound is the kernel's: one byte more is refused by it."""
    room = paths.SOCKET_PATH_LIMIT - len(os.fsencode(directory)) - len("//store.sock")
    prepared = paths.prepare(directory / ("d" * room))
    assert len(os.fsencode(prepared.socket)) == paths.SOCKET_PATH_LIMIT
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(prepared.socket))
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="too long"):
        sock.bind(os.fspath(prepared.socket) + "x")


def as_user(uid, program, directory):
    """Run a Python program with a directory, as a user who may not even read this interpreter; what it printed."""
    become = f"import os; os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
    command = [sys.executable, "-c", IMPORTS + become + program, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr.strip()


IMPORTS = """
import sys
from pathlib import Path
from shared_store.runtime import paths
from shared_store.client.session import Session
from shared_store.base.errors import WoolyError
"""
CONNECT = """
try:
    Session.connect(Path(sys.argv[1]), autostart=False)
    print("connected")
except WoolyError as error:
    print(f"{error.code}: {error}")
"""
PREPARE = """
try:
    paths.prepare(Path(sys.argv[1]))
    print("prepared")
except WoolyError as error:
    print(f"{error.code}: {error}")
"""


@needs_root
def test_a_read_only_directory(directory):
    os.chown(directory, NOBODY, NOBODY)
    assert as_user(NOBODY, PREPARE, directory) == "prepared"
    directory.chmod(0o500)
    assert as_user(NOBODY, PREPARE, directory).startswith("config: cannot write in the runtime directory")


@needs_root
def test_another_user_cannot_reach_the_socket(store):
    assert as_user(NOBODY, CONNECT, store.directory).startswith("unsafe_path: ")
    assert store.paths.socket.stat().st_mode & 0o777 == 0o600


@needs_root
def test_another_user_that_reaches_the_socket_is_refused_by_its_uid(store):
    """The file modes are opened by hand: the kernel's word about the peer decides."""
    store.directory.chmod(0o711)
    store.paths.socket.chmod(0o666)
    said = as_user(NOBODY, CONNECT, store.directory)
    assert said.startswith(f"permission_denied: uid {NOBODY} may not use the store of uid 0")
    assert f"uid {NOBODY}): " in store.log()
    assert store.client().alive()


@needs_root
def test_another_user_that_is_allowed_is_let_in(start_store):
    """The store lets it reach the socket itself; a third user reaches it too, and is refused by its uid."""
    store = start_store(allow_uids=[NOBODY])
    assert store.directory.stat().st_mode & 0o777 == 0o701
    assert as_user(NOBODY, CONNECT, store.directory) == "connected"
    assert as_user(NOBODY - 1, CONNECT, store.directory).startswith("permission_denied")


@needs_root
def test_a_group_is_let_in_and_others_are_not(start_store):
    """The store opens its directory and socket to the group itself; the directory is older and was closed."""
    import grp

    group = grp.getgrgid(NOBODY).gr_name
    store = start_store(socket_group=group)
    assert store.directory.stat().st_mode & 0o777 == 0o750
    assert store.paths.socket.stat().st_mode & 0o777 == 0o660
    assert as_user(NOBODY, CONNECT, store.directory) == "connected"
    store.stop()
    assert start_store(socket_group=group).client().alive()  # the directory is taken as the first run left it


@needs_root
def test_a_user_without_a_name_is_refused_where_a_group_is_allowed(start_store):
    """Containers have uids that no file tells of."""
    store = start_store(socket_group="daemon")
    store.directory.chmod(0o711)
    store.paths.socket.chmod(0o666)
    assert as_user(54321, CONNECT, store.directory).startswith("permission_denied: uid 54321")
    assert store.client().alive()


@needs_root
def test_a_store_that_somebody_planted_where_ones_own_would_be_is_not_trusted(monkeypatch):
    """Who can guess the default directory in a public place can be there first, and would hand out weights."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as public:
        monkeypatch.delenv("WOOLY_RUNTIME_DIR", raising=False)
        monkeypatch.setenv("XDG_RUNTIME_DIR", public)
        directory = envs.RUNTIME_DIR.get()
        directory.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as planted:
            planted.bind(str(directory / "store.sock"))
            planted.listen()
            for path in (directory / "store.sock", directory):
                os.chown(path, NOBODY, NOBODY)
            with pytest.raises(UnsafePathError, match=f"belongs to uid {NOBODY}: not trusted"):
                Client(directory)


def test_a_socket_that_is_a_file(directory):
    (directory / "store.sock").touch()
    with pytest.raises(UnsafePathError, match="is not a socket"):
        Client(directory)
    code, said = StoreProcess(directory).refused()
    assert (code, "is in the way" in said) == (2, True)


@needs_root
def test_a_socket_of_somebody_else_in_ones_directory(directory):
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(directory / "store.sock"))
        planted.listen()
        os.chown(directory / "store.sock", NOBODY, NOBODY)
        with pytest.raises(UnsafePathError, match="not trusted"):
            Client(directory)


def test_a_client_follows_no_link_to_a_store(store):
    with tempfile.TemporaryDirectory(prefix="wooly-") as other:
        link = Path(other) / "link"
        link.symlink_to(store.directory)
        with pytest.raises(UnsafePathError, match="is a link"):
            Client(link)
        inner = Path(other) / "dir"
        inner.mkdir(mode=0o700)
        (inner / "store.sock").symlink_to(store.paths.socket)
        with pytest.raises(UnsafePathError, match="not a socket"):
            Client(inner)


def test_a_directory_that_vanishes_under_a_store():
    """Who is connected goes on; who comes is told that there is none."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as parent:
        directory = Path(parent) / "d"
        directory.mkdir(mode=0o700)
        store = StoreProcess(directory).start()
        try:
            client = store.client()
            shutil.rmtree(directory)
            assert client.session.status().store.pid == store.pid
            with pytest.raises(StoreUnavailableError):
                Client(directory)
            assert store.stop() == 0
        finally:
            store.clean_up()
