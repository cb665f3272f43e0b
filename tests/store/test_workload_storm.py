"""Many workloads that want memory at once, and decline, fail and die in the middle: nobody has more than there is."""

from __future__ import annotations

import random
import threading
import time

import pytest
from support.plain_workload import MIB, InThread, PlainWorkload
from support.served import ServedStore

from shared_store.base.errors import DeclinedError
from shared_store.memory.fake import FakeBackend

BUDGET, NEEDS, STAYS = 1000, 400, 20  # MiB
FIT = 2
ROUNDS = 8
WORKLOADS = 6


class Ledger:
    """What workloads have, by their own account: from the grant until they left."""

    def __init__(self):
        self.most = 0
        self.alive = WORKLOADS
        self._has = {}
        self._lock = threading.Lock()

    def set(self, name, mib):
        with self._lock:
            self._has[name] = mib
            self.most = max(self.most, sum(self._has.values()))

    def ended(self, name):
        with self._lock:
            self._has.pop(name, None)
            self.alive -= 1


def live(one, ledger, chance, *, killed):
    """Take memory again and again, as requests arrive. Returns how often it was resident."""
    try:
        resident = 0
        for turn in range(ROUNDS):
            one.take_room(timeout_s=60)
            ledger.set(one.name, NEEDS)
            if killed and turn == ROUNDS // 2:
                return resident  # with the grant
            if chance.random() < 0.2:  # the memory could not be had
                ledger.set(one.name, STAYS)
                one.report("swapped")
                continue
            one.report("resident")
            resident += 1
            while not one.away.wait(0.02) and ledger.alive > FIT:
                pass
            if ledger.alive <= FIT:
                return resident
        return resident
    finally:
        ledger.ended(one.name)
        one.close()


def leaves(one, ledger, chance):
    """Return what a workload does when it is asked to leave."""

    def leave(_request, _call):
        if chance.random() < 0.2:
            raise DeclinedError("a request arrived")
        ledger.set(one.name, STAYS)

    return leave


@pytest.mark.parametrize("seed", range(3))
def test_nobody_has_more_than_there_is_and_all_are_served(directory, monkeypatch, seed):
    monkeypatch.setattr("shared_store.store.residency.departing.SPARED_S", {"declined": 0.05})
    options = {"budget": {"fake": BUDGET * MIB}, "vram_reserve": 0, "min_resident_s": 0.0, "turn_s": 0.0}
    ledger = Ledger()
    with ServedStore(directory, FakeBackend("fake"), **options) as served:
        workloads = [
            PlainWorkload(directory, f"w{number}", needs=NEEDS, stays=STAYS, priority=number % 3)
            for number in range(WORKLOADS)
        ]
        for one in workloads:
            one.join()
        for number, one in enumerate(workloads):
            one.leave = leaves(one, ledger, random.Random(100 * seed + number))
        lives = [
            InThread(
                lambda one=one, number=number: live(
                    one, ledger, random.Random(1000 * seed + number), killed=number == 1
                )
            )
            for number, one in enumerate(workloads)
        ]
        began = time.monotonic()
        resident = [one.join(120) for one in lives]
        assert time.monotonic() - began < 120
        assert ledger.most <= BUDGET
        assert all(times > 0 for times in resident)
        state = served.parts.state
        assert served.call(lambda: (state.workloads.waits, state.workloads.reserved)) == ([], [])
