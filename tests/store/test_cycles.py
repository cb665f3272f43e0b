"""What an ended connection leaves is freed without the garbage collector, from which the store excludes old objects."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import weakref
from pathlib import Path

import pytest
from support import cycles
from support.rawclient import RawClient
from support.waiting import wait_until

from shared_store.base.errors import ConnectionLostError, ModelNotFoundError, TimedOutError, WoolyError
from shared_store.client.session import Session
from shared_store.protocol import messages
from shared_store.store.asking import Asking

KEY, OTHER = "a" * 64, "b" * 64


def open_(session, key, **options):
    asked = {"name": "m", "engine": "test", "device": "cpu", "publish": True, "timeout_s": 10.0, **options}
    return session.open(key, **asked)


def converse(directory):
    """Connections that end in every way: grants, waits that are cancelled, errors, answers late and never, garbage."""
    with Session.connect(directory, autostart=False) as first, Session.connect(directory, autostart=False) as second:
        first.status()
        assert open_(first, KEY) is None
        with pytest.raises(TimedOutError):
            open_(second, KEY, timeout_s=0.05)
        with pytest.raises(ModelNotFoundError):
            open_(second, OTHER, publish=False)
        with first.turn("t", 10.0), pytest.raises(TimedOutError), second.turn("t", 0.05):
            pytest.fail("two have the turn")
        with pytest.raises(WoolyError):
            second.report(OTHER, 1)
        first.abandon(KEY, "by chance")
    with RawClient(directory / "store.sock", protocol=1) as old:
        old.send(messages.GetStatus(1))
        old.receive()
        old.send(messages.Open(2, KEY, "", "", "cpu", publish=True))
    with RawClient(directory / "store.sock") as waiting:
        waiting.send(messages.Acquire(1, "u"))
        waiting.receive()
        with RawClient(directory / "store.sock") as queued:
            queued.send(messages.Acquire(1, "u"))
            queued.send(messages.Open(2, KEY, "", "", "cpu", publish=False))
    with socket.socket(socket.AF_UNIX) as garbage:
        garbage.connect(str(directory / "store.sock"))
        garbage.sendall(b"\xff" * 100)
        with contextlib.suppress(OSError):
            garbage.recv(1000)


def test_a_request_of_the_store_that_a_lost_client_did_not_answer():
    """Its error refers to the frame that raised it, which does not refer to it."""

    async def lose():
        asking = Asking(lambda _: None, asyncio.Event())
        task = asyncio.create_task(asking.ask(messages.SwapOut(0, "why"), 10.0, lambda _: None))
        await asyncio.sleep(0)
        asking.ended()
        with contextlib.suppress(ConnectionLostError):
            await task
        del task  # the error refers to this frame, too
        return weakref.ref(asking)

    gc.disable()
    try:
        assert asyncio.run(lose())() is None
    finally:
        gc.enable()


def test_nothing_of_an_ended_connection_waits_for_the_collector(start_store, directory, tmp_path):
    report = tmp_path / "cycles.json"
    store = start_store(program=cycles.PROGRAM, popen={"env": {**os.environ, "WOOLY_TEST_CYCLES": str(report)}})
    for _ in range(3):
        converse(directory)
    with Session.connect(directory, autostart=False) as session:
        wait_until(lambda: len(session.status().clients) == 1, "the connections to end")
        os.kill(store.pid, signal.SIGUSR1)
        wait_until(report.exists, "the report", 30)
    found = json.loads(Path(report).read_text())
    assert {name: found[name] for name in cycles.OF_A_CONVERSATION if name in found} == {}
