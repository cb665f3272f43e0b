"""SIGKILL to the store under serving engines, on any device."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from support.engines import SHARING, status_of
from support.waiting import wait_until


def kill_store_under_load(engine: Any, path: Path, runtime_dir: Path, **job: Any) -> None:
    """An engine serves without a pause or a change. Another starts after the kill, without reading the checkpoint."""
    first = engine(path, **SHARING, **job, load=True)
    tokens = first.wait("answered")["tokens"]
    before = status_of(runtime_dir)
    os.kill(before.store.pid, signal.SIGKILL)
    second = engine(path, **SHARING, **job, hold=True)
    answer = second.wait("answered")
    assert answer["tokens"] == tokens
    assert answer["role"] == "reader"
    assert answer["bytes_read"] < (path / "model.safetensors").stat().st_size
    wait_until(lambda: status_of(runtime_dir).models[0].readers == 2, "the first engine to rejoin")
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
