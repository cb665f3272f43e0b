"""Workloads over restarts of the store: nothing is granted before it knows what they have."""

from __future__ import annotations

import pytest
from support.plain_workload import MIB, PlainWorkload
from support.waiting import wait_until

from shared_store.base.errors import ConnectionLostError

BUDGET = 1000  # MiB


@pytest.fixture
def kept(start_kept):
    return start_kept(budget={"cpu": BUDGET * MIB}, vram_reserve=0, min_resident_s=0.0)


def workload(store, name, **options):
    return PlainWorkload(store.directory, name, device="cpu", **options)


def status_of(store, name):
    return next((one for one in store.status().workloads if one.name == name), None)


def test_a_restarted_store_grants_nothing_before_workloads_joined_again(kept):
    """One asks at once, while another that has the memory joins a moment later."""
    with workload(kept, "has", needs=600) as has:
        has.join(starting=True, refusal="stays")
        has.enter()
        before = kept.kill_store()
        wait_until(lambda: kept.store_pid != before, "another store")
        with workload(kept, "asks", needs=600) as asks:
            asks.join()
            waits = asks.entering(timeout_s=60)
            wait_until(lambda: status_of(kept, "asks").waits_s > 0, "the wait")
            with workload(kept, "has", needs=600, member_of=has.id) as again:
                assert again.join("resident", refusal="stays", name="has") == ("has", 0)
                wait_until(lambda: status_of(kept, "asks").blocked_by == ("has",), "the store to know who has it")
                assert waits.waits
            waits.join(60)
        assert status_of(kept, "has") is None


def test_a_wait_ends_with_the_store_and_leaves_nothing_behind(kept):
    with workload(kept, "has", needs=600) as has, workload(kept, "asks", needs=600) as asks:
        has.join("resident", refusal="stays")
        asks.join()
        waits = asks.entering()
        wait_until(lambda: status_of(kept, "asks").blocked_by, "the wait")
        before = kept.kill_store()
        with pytest.raises(ConnectionLostError):
            waits.join()
        wait_until(lambda: kept.store_pid != before, "another store")
        assert kept.status().workloads == ()
