"""Callbacks of the event loop and garbage collections in them are timed; long ones are logged with their names."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
import time

import pytest
from support.waiting import wait_until

from shared_store.store.observe.loop_times import SLOW_S, LoopTimes, TimedLoop

LONG_S = SLOW_S * 1.5


def occupy(seconds=LONG_S):
    """Use a processor for at least this long."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.fixture
def times():
    return LoopTimes()


def run(times, work):
    with asyncio.Runner(loop_factory=lambda: TimedLoop(times)) as runner:
        runner.run(work)


def by_task(loop, done):
    async def step():
        occupy()
        done.set_result(None)

    return loop.create_task(step())


def by_future(loop, done):
    first = loop.create_future()
    first.add_done_callback(lambda _: (occupy(), done.set_result(None)))
    first.set_result(None)


def by_timer(loop, done):
    loop.call_later(0.001, lambda: (occupy(), done.set_result(None)))


def by_thread(loop, done):
    work = lambda: (occupy(), done.set_result(None))  # noqa: E731 - handed to another thread
    threading.Thread(target=loop.call_soon_threadsafe, args=(work,)).start()


def by_reader(loop, done):
    ours, theirs = socket.socketpair()

    def read():
        loop.remove_reader(ours)
        ours.close()
        theirs.close()
        occupy()
        done.set_result(None)

    loop.add_reader(ours, read)
    theirs.send(b"1")


def by_writer(loop, done):
    ours, theirs = socket.socketpair()

    def write():
        loop.remove_writer(ours)
        ours.close()
        theirs.close()
        occupy()
        done.set_result(None)

    loop.add_writer(ours, write)


def by_signal(loop, done):
    def handle():
        loop.remove_signal_handler(signal.SIGUSR1)
        occupy()
        done.set_result(None)

    loop.add_signal_handler(signal.SIGUSR1, handle)
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("way", [by_task, by_future, by_timer, by_thread, by_reader, by_writer, by_signal])
def test_a_callback_is_timed_however_it_was_scheduled(times, way):
    async def work():
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        _task = way(loop, done)
        await done

    run(times, work())
    found = times.status()
    assert found.callbacks.longest_s >= LONG_S
    assert found.longest_cpu_s >= LONG_S
    assert f"{way.__name__}.<locals>" in found.longest_callback
    assert found.callbacks.count == sum(found.callbacks.classes) > 1
    assert found.callbacks.total_s >= found.callbacks.longest_s


def test_waiting_for_a_callback_is_not_counted(times):
    async def work():
        await asyncio.sleep(LONG_S)

    run(times, work())
    assert times.status().callbacks.total_s < LONG_S


def test_time_without_a_processor_is_no_cpu_time(times):
    async def work():
        time.sleep(LONG_S)  # noqa: ASYNC251 - blocks on purpose

    run(times, work())
    found = times.status()
    assert found.callbacks.longest_s >= LONG_S > found.longest_cpu_s


def test_a_long_callback_is_logged_once_with_its_name_and_failures_are_counted_too(times, caplog):
    async def slow():
        for _ in range(2):
            occupy()
            await asyncio.sleep(0)
        raise OSError("failed")

    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="failed"):
        run(times, slow())
    (record,) = [record for record in caplog.records if "occupied" in record.message]
    assert "slow" in record.message
    assert sum(times.status().callbacks.classes[-4:]) >= 2


def test_collections_are_counted(times):
    times.watch_collections()
    try:
        gc.collect()
    finally:
        gc.callbacks.pop()
    found = times.status().collections
    assert found.count == 1
    assert 0 < found.longest_s == found.total_s


def test_a_store_reports_its_event_loop(store):
    client = store.client()
    first = client.session.status().loop
    assert 0 < first.callbacks.longest_s <= first.callbacks.total_s
    wait_until(lambda: client.session.status().loop.callbacks.count > first.callbacks.count, "callbacks to be counted")
