"""The reasons for which a workload is held, from the status of all workloads."""

from __future__ import annotations

from typing import Any

import pytest

from shared_store.base.workloads import ComputeStatus, WorkloadMemory, WorkloadStatus
from shared_store.store.observe.holding import holders, lines


def workload(
    name: str,
    priority: int = 0,
    *,
    devices: tuple[str, ...] = ("cpu",),
    state: str = "resident",
    busy: bool = True,
    computes: bool = True,
    **found: Any,
) -> WorkloadStatus:
    memory = tuple(WorkloadMemory(device, 1, 0, 0) for device in devices)
    compute = ComputeStatus(**found) if computes else None
    return WorkloadStatus(name, "vllm", 1, 1, priority, state, memory, busy=busy, compute=compute)


BATCH = workload("batch", 3, devices=("cpu", "GPU-1"), held=True, held_s=4.0)


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        (workload("chat"), True),
        (workload("chat", devices=("GPU-1",)), True),
        (workload("chat", busy=False, used_share=0.2), True),
        (workload("chat", 3), True),
        (workload("chat", 4), False),
        (workload("chat", devices=("GPU-2",)), False),
        (workload("chat", busy=False), False),
        (workload("chat", state="swapped"), False),
        (workload("chat", stalled=True), False),
        (workload("chat", computes=False), False),
    ],
)
def test_it_is_held_for_those_at_work_on_its_devices(other: WorkloadStatus, holds: bool) -> None:
    assert [one.name for one in holders(BATCH, (BATCH, other))] == ["chat"] * holds


def test_a_workload_that_is_not_held_is_held_for_nobody() -> None:
    assert holders(workload("batch", 3), (workload("chat"),)) == ()
    assert holders(workload("batch", 3, computes=False), (workload("chat"),)) == ()


def test_more_important_ones_are_named_before_equals() -> None:
    found = "\n".join(lines(BATCH, (workload("equal", 3), BATCH, workload("chat", 1, used_share=0.81)), 2.0))
    assert "held while more important workloads work: chat (P1, 81% lately); after 2 s it makes one step" in found
    assert "`wooly priority batch 1`" in found
    assert "equal" not in found
    assert "held for 4.0 s" in found


def test_among_equals_it_waits_for_its_turn() -> None:
    one = workload("one", share=25.0, held=True)
    found = "\n".join(lines(one, (one, workload("two", share=75.0, used_share=0.75))))
    assert "it waits for its turn, its share is 25%, beside: two (P0, 75% lately)" in found
    assert "`wooly share one PERCENT`" in found


def test_other_states_have_a_line() -> None:
    """Of a workload that is held no more, never held, exclusive, stalled; with an estimated time."""
    assert next(lines(BATCH, (BATCH,))) == "it is held for work that has ended since"
    for row, line in (
        (workload("one", ungated="ranks wait"), "it is not held: ranks wait"),
        (workload("one", exclusive=True), "no other workload may use its devices (GPU_MODE=Exclusive)"),
        (
            workload("one", device_s=2.5, estimated_s=0.25, used_share=0.5),
            "2.5 s of its devices, 0.2 s of it estimated",
        ),
    ):
        assert line in "\n".join(lines(row, (row,)))
    (stalled, *_) = lines(workload("one", stalled=True), ())
    assert "made no progress" in stalled
    assert list(lines(workload("one", computes=False), ())) == []
