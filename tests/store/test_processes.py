"""Processes of clients: their description, their death, and PID namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from support.content import key
from support.rawclient import RawClient
from support.stores import StoreProcess, wait_for_status
from support.users import needs_root, wooly_as
from support.waiting import process_state, wait_until

from shared_store.client.session import Session
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import MAX_GPUS, Identity
from shared_store.protocol.peers import watch_process
from shared_store.store.clients.process_watch import CLOSES_WITHIN_S

POD = {"WOOLY_POD_NAMESPACE": "serving", "WOOLY_POD_NAME": "llama-0", "WOOLY_CONTAINER_NAME": "engine"}
GPU = "GPU-11111111-2222-3333-4444-555555555555"


def rows_of(client, name):
    return [row for row in client.session.status().clients if row.name == name]


# Descriptions.


def test_a_client_describes_its_process(store, directory, monkeypatch):
    """By its kind and devices, and by environment variables."""
    for variable, value in {
        **POD,
        "WOOLYAI_PRIO": "P3",
        "WOOLYAI_SWAP_FROM_VRAM": "0",
        "WOOLY_WORKLOAD": "chat",
    }.items():
        monkeypatch.setenv(variable, value)
    with Session.connect(directory, name="engine 1", kind="vllm", gpus=("cpu", GPU)):
        (row,) = rows_of(store.client(), "engine 1")
    assert (row.pid, row.pid_known, row.uid) == (os.getpid(), True, os.getuid())
    assert (row.workload, row.kind, row.priority, row.swap, row.gpus) == ("chat", "vllm", 3, False, (GPU,))
    assert (row.namespace, row.pod, row.container) == ("serving", "llama-0", "engine")


def test_a_client_that_describes_nothing(store):
    """As a client of an earlier version."""
    with RawClient(store.paths.socket):
        (row,) = rows_of(store.client(), "raw")
    assert (row.workload, row.kind, row.priority, row.swap) == ("raw", "other", 0, True)
    assert (row.gpus, row.namespace, row.pod, row.container, row.activity) == ((), "", "", "", None)


def test_a_description_is_made_printable_and_bounded(store):
    hostile = Identity(
        "name\x1b[2J" * 40,
        "kind\n",
        99,
        True,
        ("GPU-1\n", *(f"GPU-{n}" for n in range(60))),
        "a\nb",
        "p" * 500,
        "\u202e",
    )
    with RawClient(store.paths.socket, greet=False) as raw:
        raw.send(messages.Hello(messages.VERSION, "raw\r\n", "0", identity=hostile))
        assert isinstance(raw.receive(), messages.Welcome)
        (row,) = rows_of(store.client(), r"raw\r\n")
    assert (row.kind, row.priority, row.namespace, row.container) == ("other", 4, r"a\nb", r"\u202e")
    assert row.gpus == tuple(f"GPU-{n}" for n in range(MAX_GPUS - 1))
    assert len(row.workload) == 200
    assert row.workload.isprintable()
    assert len(row.pod) == 253


@pytest.mark.parametrize("value", ["5", "-1", "high"])
def test_a_priority_that_does_not_exist_is_an_error(directory, monkeypatch, value):
    from shared_store.base.errors import ConfigError

    monkeypatch.setenv("WOOLYAI_PRIO", value)
    with pytest.raises(ConfigError, match=r"WOOLYAI_PRIO=.*use 0 \(highest\) to 4"):
        Session.connect(directory, autostart=False)


# Deaths.


def watches_processes():
    import socket

    left, right = socket.socketpair()
    with left, right:
        found = watch_process(left)
    if found is not None:
        found.close()
    return found is not None


needs_pidfds = pytest.mark.skipif(not watches_processes(), reason="this kernel has no SO_PEERPIDFD (Linux 6.5)")

COPIES = """
import os, subprocess, sys
from pathlib import Path
from shared_store.client.session import Session
session = Session.connect(Path(sys.argv[1]), name="parent", autostart=False)
fd = next(int(n) for n in os.listdir("/proc/self/fd")
          if os.readlink(f"/proc/self/fd/{n}").startswith("socket:") and int(n) > 2)
child = subprocess.Popen(["sleep", "600"], pass_fds=(fd,))
print(child.pid, flush=True)
sys.stdin.read()
"""


@needs_pidfds
def test_a_client_is_gone_when_its_process_ends_though_a_child_has_its_socket(store, directory):
    process = subprocess.Popen(
        [sys.executable, "-c", COPIES, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        client = store.client()
        assert rows_of(client, "parent")
        process.kill()
        wait_until(lambda: not rows_of(client, "parent"), "the client to go", timeout_s=10 * CLOSES_WITHIN_S)
        assert process_state(child) == "S"
        assert "its process ended" in store.log()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


@needs_pidfds
def test_the_last_requests_of_a_process_that_ends_are_read(store, actor):
    """Its end may be noticed before its socket is read."""
    client, one = store.client(), actor(name="short")
    one.publish(key=key(1), model=[[1, 1 << 20]])
    one.kill()
    wait_for_status(client, lambda status: not [row for row in status.clients if row.name == "short"], "the end")
    assert [model.key for model in client.session.status().models] == [key(1)]


# PID namespaces.


@pytest.fixture
def apart(directory):
    """A store in a PID namespace of its own, in which no client of the test has a number."""
    through = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*through, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this process may not make a PID namespace")
    store = StoreProcess(directory).start(through=through)
    yield store
    store.clean_up()


def test_a_client_of_another_pid_namespace_has_no_pid(apart, actor):
    actor(name="in a pod", env=POD)
    actor(name="somewhere")
    client = apart.client("me")
    (pod,), (unknown,) = rows_of(client, "in a pod"), rows_of(client, "somewhere")
    assert (pod.pid, pod.pid_known, pod.uid, pod.pod) == (0, False, os.getuid(), "llama-0")
    assert (unknown.pid, unknown.pid_known, unknown.pod) == (0, False, "")


@needs_root
def test_people_see_the_pod_or_unknown(apart, actor):
    actor(name="in a pod", env=POD)
    actor(name="somewhere")
    lines = wooly_as("status", uid=0).stdout.splitlines()
    assert next(line.split()[0] for line in lines if " in a pod " in line) == "serving/llama-0/engine"
    assert next(line.split()[0] for line in lines if " somewhere " in line) == "unknown"
    apart.client().session.report_fallback("model", "a test")
    wait_until(lambda: "pid=unknown" in wooly_as("events", uid=0).stdout, "the event to reach the catalog")


def test_a_waiting_client_is_told_the_pod_that_it_waits_for(apart, actor):
    publisher = actor(name="loader", env=POD)
    publisher.open(key=key(1))
    with RawClient(apart.paths.socket) as raw:
        raw.send(messages.Open(1, key(1), "", "", "cpu", publish=True))
        frame = raw.channel.receive()
        push = messages.decode_from_store(frame.payload)
    assert (push.kind, push.detail) == ("waiting", "serving/llama-0/engine loader")


@needs_pidfds
def test_the_end_of_a_process_of_another_pid_namespace_is_noticed(apart, directory):
    test_a_client_is_gone_when_its_process_ends_though_a_child_has_its_socket(apart, directory)


def test_a_client_with_the_longest_description_is_greeted(store, directory, monkeypatch):
    """A greeting has at most 4 KiB."""
    for variable in ("WOOLY_WORKLOAD", *POD):
        monkeypatch.setenv(variable, "模" * 5000)
    gpus = [f"GPU-{number:032x}-{number:027x}" for number in range(100)]
    with Session.connect(directory, name="型" * 5000, gpus=gpus, autostart=False):
        rows = [row for row in store.client().session.status().clients if row.gpus]
    assert [len(row.gpus) for row in rows] == [MAX_GPUS]
