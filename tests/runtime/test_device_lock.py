"""Locks of devices: one holder on the node, whoever made the file, until its last descriptor is closed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shared_store.base.errors import ConfigError
from shared_store.runtime.device_lock import GRANTS, RETURNS, lock_path, try_lock

GPU = "GPU-0a1b2c3d-0000-1111-2222-333344445555"


@pytest.fixture(autouse=True)
def lock_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("WOOLY_LOCK_DIR", str(tmp_path))
    return tmp_path


HOLDER = f"""
import sys
from shared_store.runtime.device_lock import GRANTS, try_lock
held = try_lock({GPU!r}, GRANTS)
print(held is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_one_process_has_the_lock_until_it_is_killed(holder):
    assert holder.stdout.readline() == "True\n"
    assert try_lock(GPU, GRANTS) is None
    with try_lock(GPU, RETURNS):  # another purpose, another lock
        pass
    holder.kill()
    holder.wait()
    with try_lock(GPU, GRANTS):
        assert lock_path(GPU, GRANTS).stat().st_mode & 0o777 == 0o644


def test_the_file_may_be_read_only():
    """Another user's store made it: this one may only read it."""
    try_lock(GPU, GRANTS).close()
    lock_path(GPU, GRANTS).chmod(0o444)
    with try_lock(GPU, GRANTS):
        assert try_lock(GPU, GRANTS) is None


def test_a_link_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "elsewhere").touch()
    lock_path(GPU, GRANTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is a link; set WOOLY_LOCK_DIR"):
        try_lock(GPU, GRANTS)


def test_a_pipe_in_place_of_the_file_is_refused():
    os.mkfifo(lock_path(GPU, GRANTS))
    with pytest.raises(ConfigError, match="not a regular file"):
        try_lock(GPU, GRANTS)


def test_a_directory_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("WOOLY_LOCK_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="set WOOLY_LOCK_DIR to a directory of all users"):
        try_lock(GPU, GRANTS)


def test_a_name_that_leaves_the_directory_is_refused():
    with pytest.raises(ConfigError, match="no name of a device"):
        try_lock("../cpu", GRANTS)
