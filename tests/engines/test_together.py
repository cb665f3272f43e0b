"""Several engines on one store: one publishes, and the death of one affects no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, status_of
from support.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_four_engines_at_once_read_the_checkpoint_once(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """Of four engines that start together one hashes and loads; the others read no weights; all answers are equal.

    Bytes read are counted by the kernel; loading shows in vLLM's log.
    """
    path = checkpoint("smollm2")
    processes = [engine(path, **SHARING, gate=True) for _ in range(4)]
    for process in processes:
        process.wait("imported")
    for process in processes:
        process.tell("start")
    answers = [process.wait("answered") for process in processes]
    assert [process.finish() for process in processes] == [0] * 4
    assert [answer["tokens"] for answer in answers] == [answers[0]["tokens"]] * 4
    weights = (path / "model.safetensors").stat().st_size
    hashed = [answer["bytes_read"] >= weights for answer in answers]
    loaded = [any("Loading weights took" in line for line in process.log) for process in processes]
    assert sorted(hashed) == [False, False, False, True]
    assert loaded == hashed
    counters = status_of(runtime_dir).counters
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (1, 4, 0)


def test_publisher_killed_while_publishing_and_the_next_takes_over(
    engine: Any, checkpoint: Any, runtime_dir: Path
) -> None:
    """The next engine publishes; no bytes of the dead one are served or left in memory."""
    path = checkpoint("smollm2")
    first = engine(path, **SHARING)
    publishing = _publisher_with_memory(runtime_dir, first)
    first.process.kill()
    first.process.wait()
    second = engine(path, **SHARING)
    answer = second.wait("answered")
    assert second.finish() == 0
    status = status_of(runtime_dir)
    model = status.models[0]
    assert (model.key, model.state) == (publishing, "committed")
    assert status.counters.aborted_publishes == 1
    assert status.devices[0].dead_bytes == 0
    assert status.devices[0].resident_bytes < model.bytes * 1.05
    stock = engine(path, environment={"WOOLY_CPU_DISPATCH": "1"})
    assert answer["tokens"] == stock.wait("answered")["tokens"]


def _publisher_with_memory(runtime_dir: Path, process: Any) -> str:
    """Wait until an engine has segments to write to, and stop it there; return the model's key."""
    import signal

    process.wait("starting")
    seen: list[str] = []

    def writing() -> bool:
        try:
            status = status_of(runtime_dir)
        except Exception:  # noqa: BLE001 - the store is not up yet; the engine starts it
            return False
        seen[:] = [model.key for model in status.models if model.state == "publishing"]
        return bool(seen) and status.devices[0].segments > 0

    wait_until(writing, "the engine has segments to write to", timeout_s=120)
    process.process.send_signal(signal.SIGSTOP)
    assert status_of(runtime_dir).models[0].state == "publishing", "the engine was too fast to be caught"
    return seen[0]


def test_reader_killed_and_its_lease_is_gone_at_once(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """SIGKILL of a reader ends its lease; the other engine still answers, and a third attaches."""
    path = checkpoint("llama")
    staying, dying = engine(path, **SHARING, hold=True), engine(path, **SHARING, hold=True)
    before = staying.wait("answered")["tokens"]
    dying.wait("answered")
    assert status_of(runtime_dir).models[0].readers == 2
    dying.process.kill()
    dying.process.wait()
    wait_until(lambda: status_of(runtime_dir).models[0].readers == 1, "the dead reader's lease ends", timeout_s=5)
    staying.tell("go on")
    assert staying.wait("answered again")["tokens"] == before
    third = engine(path, **SHARING)
    assert third.wait("answered")["tokens"] == before


def test_a_dead_store_stops_no_engine(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """The store is killed while an engine serves: the answers do not change, since the memory stays mapped."""
    import os
    import signal

    from shared_store.client.session import Session

    process = engine(checkpoint("llama"), **SHARING, hold=True)
    before = process.wait("answered")["tokens"]
    with Session.connect(runtime_dir, autostart=False) as session:
        os.kill(session.store_pid, signal.SIGKILL)
    process.tell("go on")
    assert process.wait("answered again")["tokens"] == before
    assert process.finish() == 0
