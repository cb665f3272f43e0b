"""The store is killed under engines that answer: they do not notice, and the next engine attaches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.engines import status_of
from support.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SHARING: dict[str, Any] = {"load_format": "wooly", "extra": {"fallback": False}}


def test_store_killed_under_load(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """One engine answers all the while, and alike; another starts after the kill, and reads none of the checkpoint."""
    path = checkpoint("smollm2")
    first = engine(path, **SHARING, load=True)
    tokens = first.wait("answered")["tokens"]
    before = status_of(runtime_dir)
    os.kill(before.store.pid, signal.SIGKILL)
    second = engine(path, **SHARING, hold=True)
    answer = second.wait("answered")
    assert answer["tokens"] == tokens
    assert answer["role"] == "reader"
    assert answer["bytes_read"] < (path / "model.safetensors").stat().st_size
    wait_until(lambda: status_of(runtime_dir).models[0].readers == 2, "the first engine to be counted again")
    after = status_of(runtime_dir)
    assert after.store.pid != before.store.pid
    assert after.totals.resident_bytes == before.totals.resident_bytes
    assert (after.counters.publishes, after.counters.fallbacks) == (0, 0)
    first.tell("stop")
    worked = first.wait("worked")
    assert worked["rounds"] > 0
    assert worked["wrong"] == 0
    second.tell("go on")
    assert [first.finish(), second.finish()] == [0, 0]
