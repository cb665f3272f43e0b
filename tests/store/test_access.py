"""Admission by group: numbers, supplementary groups, and groups that are deleted while the store runs."""

from __future__ import annotations

import grp
import os
import shutil
import subprocess

import pytest
from support.users import NOBODY, connect_as, needs_root

GROUP = 54321  # has no name here
STRANGER = 12345  # a uid without a name, as in containers

pytestmark = needs_root


def test_a_group_may_be_a_number(start_store):
    """In a container a group need not have a name."""
    store = start_store(socket_group=str(GROUP))
    assert store.directory.stat().st_gid == store.paths.socket.stat().st_gid == GROUP
    assert connect_as(store.directory, uid=STRANGER, gid=GROUP) == "connected"


def test_supplementary_groups_count(start_store):
    """Of a user without a name: the kernel reports the groups of the process."""
    group = grp.getgrgid(1)
    store = start_store(socket_group=group.gr_name)
    assert connect_as(store.directory, uid=STRANGER, gid=NOBODY, groups=[7, group.gr_gid]) == "connected"


def test_many_supplementary_groups(start_store):
    """More than fit the first buffer."""
    store = start_store(socket_group=str(GROUP))
    assert connect_as(store.directory, uid=STRANGER, groups=[*range(1000, 1400), GROUP]) == "connected"


def test_others_are_refused(start_store):
    store = start_store(socket_group=str(GROUP))
    store.directory.chmod(0o711)
    store.paths.socket.chmod(0o666)
    said = connect_as(store.directory, uid=STRANGER, gid=NOBODY, groups=[GROUP + 1])
    assert said.startswith(f"permission_denied: uid {STRANGER} may not use the store of uid 0")
    assert store.client().alive()


@pytest.fixture
def own_groups(tmp_path):
    """A copy of the group database, and the command that shows it to a process as `/etc/group`."""
    copy = tmp_path / "group"
    shutil.copyfile("/etc/group", copy)
    with copy.open("a") as file:
        file.write(f"wooly-test:x:{GROUP}:\n")
    through = ("unshare", "--mount", "sh", "-c", f'mount --bind {copy} /etc/group && exec "$@"', "sh")
    if subprocess.run([*through, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount")
    return copy, through


def test_a_group_that_is_deleted_while_the_store_runs(directory, own_groups, start_store):
    """Nothing fails in the event loop: members go on to be admitted, and others are refused, each with an answer."""
    copy, through = own_groups
    store = start_store(socket_group="wooly-test", popen={"through": through})
    assert connect_as(directory, uid=STRANGER, gid=GROUP) == "connected"
    text = copy.read_text()
    os.truncate(copy, 0)
    copy.write_text(text.replace(f"wooly-test:x:{GROUP}:\n", ""))
    directory.chmod(0o711)
    store.paths.socket.chmod(0o666)
    assert connect_as(directory, uid=STRANGER, gid=GROUP) == "connected"
    assert connect_as(directory, uid=NOBODY).startswith("permission_denied: ")
    assert "Exception in callback" not in store.log()
    assert "Traceback" not in store.log()
