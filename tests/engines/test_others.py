"""Memory of others while an engine starts: which bytes are an engine's own, and what a snapshot leaves out."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.plain_workload import PlainWorkload
from support.stores import KeptStore

from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]

MIB = 1 << 20


@pytest.fixture(scope="module")
def others() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        from wooly_vllm.memory import others
    return others


def test_a_snapshot_leaves_out_what_other_workloads_take_and_give(others: Any, runtime_dir: Path) -> None:
    """Bytes of the workload that starts are its own, however they change."""
    store = KeptStore(runtime_dir, budget={"cpu": 1 << 30}, vram_reserve=0)
    store.start()
    try:
        with (
            PlainWorkload(runtime_dir, "starts", device="cpu", needs=100) as own,
            PlainWorkload(runtime_dir, "other", device="cpu", needs=30, stays=5) as other,
            Session.connect(runtime_dir, autostart=False) as session,
        ):
            own.join("swapped", 0, starting=True)
            other.join("swapped", 5)
            compared = others.Others(session, "cpu", own.id, 0)
            free = [1000 * MIB]

            def measure(snapshot: Any) -> None:
                snapshot.free_memory, snapshot.cuda_memory, snapshot.non_torch_memory = free[0], 7 * MIB, 7 * MIB

            measured = others.corrected(measure, lambda: compared)
            snapshot = SimpleNamespace()
            measured(snapshot)
            assert snapshot.free_memory == 1000 * MIB

            other.enter()
            own.report("swapped", 40)
            free[0] -= (25 + 40) * MIB
            measured(snapshot)
            assert snapshot.free_memory == 960 * MIB
            assert snapshot.cuda_memory == snapshot.non_torch_memory == (7 - 25) * MIB

            other.report("draining")
            other.report("leaving")
            other.report("swapped")
            free[0] += 25 * MIB
            measured(snapshot)
            assert snapshot.free_memory == 960 * MIB
    finally:
        store.clean_up()


def test_without_a_store_a_snapshot_is_as_it_was_measured(others: Any, runtime_dir: Path) -> None:
    store = KeptStore(runtime_dir)
    store.start()
    session = Session.connect(runtime_dir, autostart=False)
    compared = others.Others(session, "cpu", "nobody", 0)
    assert compared.taken() == 0
    session.close()
    store.clean_up()
    assert compared.taken() == 0
