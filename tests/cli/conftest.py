"""Run the `wooly` command in a private runtime directory; and an example of a status."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from support.fixtures import actor, directory, start_store, store
from support.waiting import process_state, wait_until

from shared_store.base.errors import StoreUnavailableError
from shared_store.base.status import (
    ArbiterStatus,
    CatalogStatus,
    ClientStatus,
    Counters,
    DeviceStatus,
    DurationStatus,
    KeeperStatus,
    LoopStatus,
    ModelStatus,
    NodeStatus,
    OvercommitStatus,
    PauseStatus,
    QuarantineStatus,
    RefusalStatus,
    RequestStatus,
    Status,
    StoreStatus,
    SwapStatus,
    Totals,
)
from shared_store.base.workloads import ComputeStatus, WorkloadMemory, WorkloadStatus
from shared_store.client.session import Session

__all__ = ["actor", "directory", "start_store", "store"]

COMMAND = [sys.executable, "-m", "shared_store.cli"]


@pytest.fixture
def wooly(directory):
    """Run the command. A store that it started ends with the test."""

    def run(*arguments, **environment):
        return subprocess.run(
            [*COMMAND, *arguments],
            env={**os.environ, "COLUMNS": "100", **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    yield run
    with contextlib.suppress(StoreUnavailableError), Session.connect(directory, autostart=False) as session:
        keeper = session.status().keeper
        pids = [session.store_pid, *([keeper.pid] if keeper is not None else [])]
        session.shutdown_store()
        wait_until(lambda: all(process_state(pid) in {"", "Z"} for pid in pids), "store and keeper to end")


@pytest.fixture
def background(directory):  # noqa: ARG001 - sets the environment
    """Start the command in the background. It ends with the test.

    It handles Ctrl-C as at a terminal, also if the tests run in the background of a shell, which ignores Ctrl-C.
    """
    started = []
    at_terminal = ["env", "--default-signal=INT"]

    def start(*arguments, **popen):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
        started.append(subprocess.Popen([*at_terminal, *COMMAND, *arguments], **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def status():
    """A status with two models, one of them being published, a client in every role, and two workloads."""
    models = tuple(
        ModelStatus(
            *(key * 32, name, "vllm", "cpu", state, 3, nbytes, nbytes // 2, readers),
            pinned=False,
            away=readers // 2,
            resident_bytes=nbytes // 4,
            host_bytes=nbytes // 8,
            disk_bytes=nbytes // 16,
        )
        for key, name, state, nbytes, readers in (
            ("a1", "base", "committed", 3 << 30, 2),
            ("b2", 'odd "name"\\', "publishing", 0, 0),
        )
    )
    clients = tuple(
        ClientStatus(number, 100 + number, 1000, f"client {number}", key, role, mapped, mapped // 100)
        for number, (key, role, mapped) in enumerate(
            (
                ("a1" * 32, "reader", 3 << 30),
                ("a1" * 32, "reader", 3 << 30),
                ("b2" * 32, "publisher", 0),
                ("", "idle", 0),
            ),
            1,
        )
    )
    return Status(
        node=NodeStatus("host-1", "host", "/run/wooly"),
        store=StoreStatus(42, "1.2.3", 93784.5, "degraded", ("the catalog does not answer",)),
        catalog=CatalogStatus("redis://host:6379/0", "down"),
        devices=(
            DeviceStatus(
                "cpu",
                4 << 30,
                64 << 30,
                5,
                3 << 20,
                2 << 20,
                releasing_bytes=1 << 21,
                host_bytes=1 << 22,
                budget_bytes=32 << 30,
                reserve_bytes=1 << 28,
                free_bytes=-(1 << 20),
                granted_bytes=1 << 23,
                foreign_bytes=1 << 24,
                overcommit=True,
                disk_bytes=1 << 25,
            ),
            DeviceStatus("GPU-1", 1 << 20, None, 1),
        ),
        models=models,
        clients=clients,
        totals=Totals((4 << 30) + (1 << 20), 6 << 30, 3 << 30),
        counters=Counters(
            attaches=7,
            publishes=2,
            aborted_publishes=1,
            fallbacks=3,
            protocol_errors=4,
            evictions=5,
            compactions=6,
            quarantines=8,
            permission_denials=9,
            unconfirmed_releases=10,
            sleeps=11,
            wakes=12,
            returns=13,
        ),
        quarantine=(QuarantineStatus("cpu", 9, 2 << 20, ("c3" * 32,), 1),),
        requests=(RequestStatus("open", 6, 12.5, (1, 2, 0, 0, 0, 0, 2, 0, 0, 0, 1)),),
        keeper=KeeperStatus(41, "ok", 3, "ok"),
        loop=LoopStatus(
            PauseStatus(9, 0.5, 0.25, (0, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0)),
            PauseStatus(2, 0.125, 0.0625, (0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0)),
            "Server._serve",
            0.0625,
        ),
        workloads=(
            WorkloadStatus(
                *(
                    "chat",
                    "vllm",
                    101,
                    1000,
                    0,
                    "resident",
                    (WorkloadMemory("cpu", 5 << 30, 3 << 30, 1 << 30, 6 << 30),),
                ),
                busy=True,
                idle_s=0.5,
                running=3,
                waiting=1,
                starved_s=1.5,
                swaps=2,
                refusals=1,
                models=("a1" * 32,),
                compute=ComputeStatus(75.0, 0.625, 3725.5, 12.25, 1.5, gated=True),
            ),
            WorkloadStatus(
                *(
                    "batch",
                    "transformers",
                    0,
                    1001,
                    3,
                    "swapped",
                    (WorkloadMemory("cpu", 1 << 20, 0, 1 << 20, 1 << 30),),
                ),
                pid_known=False,
                pod="batch-0",
                swappable=False,
                refusal="WOOLYAI_SWAP_FROM_VRAM=0",
                idle_s=75.0,
                blocked_by=("chat", "reserve"),
                waits_s=2.5,
                starved_s=4.5,
                compute=ComputeStatus(
                    used_share=0.125,
                    device_s=61.0,
                    held_s=42.5,
                    held=True,
                    stalled=True,
                    ungated="ranks wait for each other",
                ),
            ),
        ),
        overcommit=OvercommitStatus(
            (SwapStatus("out", 2, 7 << 20), SwapStatus("in", 1, 5 << 20)),
            (DurationStatus("copy", 3, 0.5, (0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0)),),
            tuple(
                DurationStatus(str(number), number, number / 4, (0,) * 5 + (number,) + (0,) * 5) for number in range(5)
            ),
            (0, 0, 0, 1, 0),
            (RefusalStatus("declined", 1),),
        ),
        arbiter=ArbiterStatus("ok", 43, 2, 2.0),
    )
