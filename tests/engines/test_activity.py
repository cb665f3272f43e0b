"""An engine's activity page: what it says while it answers, when it is idle, and after a restart of the store."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, status_of
from support.waiting import wait_until

from shared_store.base.errors import WoolyError
from shared_store.base.status import ClientStatus
from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def reader(runtime_dir: Path) -> ClientStatus | None:
    """Return the engine's row in the status; None while the store restarts."""
    try:
        rows = [row for row in status_of(runtime_dir).clients if row.role == "reader"]
    except WoolyError:
        return None
    return rows[0] if rows else None


def working(runtime_dir: Path) -> bool:
    row = reader(runtime_dir)
    return row is not None and row.activity is not None and row.activity.busy and row.activity.running > 0


def idle(runtime_dir: Path) -> bool:
    row = reader(runtime_dir)
    return row is not None and row.activity is not None and not row.activity.busy


def test_the_store_sees_an_engine_work_and_rest(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    process = engine(checkpoint("smollm2"), **SHARING, load=True, hold=True, environment={"WOOLYAI_PRIO": "2"})
    process.wait("answered")
    wait_until(lambda: working(runtime_dir), "the status to show running requests", timeout_s=60)
    row = reader(runtime_dir)
    assert row is not None
    assert (row.kind, row.priority, row.pid) == ("vllm", 2, process.process.pid)

    os.kill(status_of(runtime_dir).store.pid, signal.SIGKILL)
    wait_until(lambda: working(runtime_dir), "the restarted store to show them", timeout_s=60)

    process.tell("stop")
    assert process.wait("worked")["wrong"] == 0
    wait_until(lambda: idle(runtime_dir), "the status to show that it is idle")
    row = reader(runtime_dir)
    assert row is not None
    assert row.activity is not None
    assert (row.activity.running, row.activity.waiting) == (0, 0)
    assert row.activity.idle_s is not None
    process.tell("go on")
    process.wait("answered again")
    assert process.finish() == 0


def test_an_engine_whose_workers_are_processes_reports_through_the_session_that_speaks_for_it(
    engine: Any, checkpoint: Any, runtime_dir: Path
) -> None:
    """The workers read the model; the process that makes the steps has nothing but the page."""
    cpus = sorted(os.sched_getaffinity(0))
    process = engine(
        checkpoint("llama"),
        **SHARING,
        settings={"tensor_parallel_size": 2},
        load=True,
        lease=False,
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"},
    )
    process.wait("answered")
    with Session.connect(runtime_dir, autostart=False) as session:  # one: the engine's threads leave little of the CPU

        def own() -> ClientStatus | None:
            return next((row for row in session.status().clients if row.pid == process.process.pid), None)

        def at_work() -> bool:
            row = own()
            return row is not None and row.activity is not None and row.activity.busy and row.activity.running > 0

        wait_until(at_work, "the status to show running requests", timeout_s=60)
        row = own()
        assert row is not None
        assert (row.role, row.kind) == ("idle", "vllm")
        readers = [one for one in session.status().clients if one.role == "reader"]
    assert [one.kind for one in readers] == ["vllm"] * 2
    process.tell("stop")
    assert process.wait("worked")["wrong"] == 0
    assert process.finish() == 0
