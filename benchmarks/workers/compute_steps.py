"""A workload of synthetic steps, for the benchmark ``compute``: steps like those of a decode and of a long prefill.

A step is a number of equal pieces of work, which is measured once for all processes: on a GPU products of matrices
(``decode``: of few rows, which read memory; ``prefill``: of many rows, which fill the GPU), on a CPU digests, with the
process on one core. It ends when the device has finished it.

Words are a command and, after a space, its arguments as JSON. Answers are like those of ``workers/compute_engine.py``:
a step counts as a token. Relies on nothing of an engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, now, play
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.session import Session
from shared_store.compute.gate import ComputeGate
from shared_store.overcommit.agent import Agent
from shared_store.overcommit.mover import Holdings, Reached

SIDE = 8192
ROWS = {"decode": 16, "prefill": 4096}
MATRICES = 8
"""More bytes than a GPU caches, so that each product reads memory."""

BLOCK = bytes(64 << 10)
CALIBRATE_S = 0.3
JOIN_TIMEOUT_S = 60.0

Piece = Callable[[str, int], None]
"""Does a number of pieces of a kind, and waits until the device has finished them."""


def steps(talk: Talk, job: dict[str, Any]) -> None:
    """Join the store, then obey.

    ``job``: ``device`` (the store's name), ``core`` (of a CPU), ``pieces`` (of a step, by kind; empty: not measured
    yet), ``workload`` (its name; empty: it does not join), ``priority``, ``share``. Waits for the word ``start``.
    """
    on_cpu = job["device"] == "cpu"
    piece = _cpu(int(job["core"])) if on_cpu else _gpu()
    talk.send("imported")
    words = talk.words()
    if next(words, "") != "start":
        return
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(_joined(job)) if job["workload"] else None
        # A CPU's other work does not change the time of a process.
        stepping = _Stepping(piece, job["pieces"], gate, time.process_time if on_cpu else time.perf_counter)
        talk.send("ready")
        for word in words:
            command, _, given = word.partition(" ")
            talk.send(command, **getattr(stepping, command)(**json.loads(given or "{}")))


def _cpu(core: int) -> Piece:
    """Digest blocks on one core: the device that all processes share."""
    os.sched_setaffinity(0, {core})

    def run(_kind: str, pieces: int) -> None:
        for _ in range(pieces):
            hashlib.sha256(BLOCK)

    return run


def _gpu() -> Piece:
    """Multiply matrices on the first visible GPU."""
    import torch

    matrices = [torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(MATRICES)]
    left = {kind: torch.randn(rows, SIDE, dtype=torch.bfloat16, device="cuda") for kind, rows in ROWS.items()}
    out = {kind: torch.empty_like(one) for kind, one in left.items()}

    def run(kind: str, pieces: int) -> None:
        for number in range(pieces):
            torch.matmul(left[kind], matrices[number % MATRICES], out=out[kind])
        torch.cuda.synchronize()

    for kind in ROWS:
        run(kind, MATRICES)  # chooses the kernels
    return run


class _Stays:
    """The mover of a workload that is never swapped out."""

    def leave(self, *, active: bool, within_s: float, reached: Reached) -> Holdings:
        """Do not leave: the store never asks."""
        raise NotImplementedError

    def come_back(self) -> Holdings:
        """Be there."""
        return self.holdings()

    def prepare_checkpoint(self) -> None:
        """Have nothing to prepare."""

    def holdings(self) -> Holdings:
        """Have no memory in the account."""
        return Holdings()


@contextlib.contextmanager
def _joined(job: Mapping[str, Any]) -> Any:
    """Join the store and its arbiter; yield the gate."""
    settings = WorkloadSettings(
        workload=job["workload"], priority=job["priority"], swap=False, compute_share=job["share"]
    )
    agent = Agent(
        lambda identity: Session(Path(os.environ["WOOLY_RUNTIME_DIR"]), job["workload"], identity=identity),
        _Stays(),
        kind="vllm",
        name=job["workload"],
        devices=(job["device"],),
        refusal="it has synthetic steps alone",
        settings=settings,
    )
    gate = ComputeGate(lambda: None)
    agent.join()
    try:
        agent.take_room({}, JOIN_TIMEOUT_S)
        agent.joined_resident(Holdings())
        agent.compute(gate)
        yield gate
    finally:
        agent.close()


class _Stepping:
    """Makes steps. Each command returns the facts of its event; times are those of the monotonic clock."""

    def __init__(
        self, piece: Piece, pieces: Mapping[str, int], gate: ComputeGate | None, clock: Callable[[], float]
    ) -> None:
        self._piece = piece
        self._pieces = dict(pieces)
        self._gate = gate
        self._clock = clock

    def calibrate(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Return the pieces of a step of each kind, given its duration alone."""
        found = {}
        for kind, wanted in seconds.items():
            began, done = self._clock(), 0
            while self._clock() - began < CALIBRATE_S:
                self._piece(kind, 8)
                done += 8
            found[kind] = max(1, round(wanted * done / (self._clock() - began)))
        return {"pieces": found}

    def tokens(self, kind: str, at: float, seconds: float) -> dict[str, Any]:
        """Make steps without pause from a time on; return the durations of those that ended in time, waits included."""
        return self._steps(kind, at, at, at + seconds)

    def load(self, kind: str, at: float, lead: float, seconds: float) -> dict[str, Any]:
        """The same, from ``lead`` seconds before that time on."""
        return self._steps(kind, at - lead, at, at + seconds)

    def requests(self, kind: str, at: float, arrivals: list[float], tokens: int) -> dict[str, Any]:
        """Serve requests in the order in which they arrive, so many steps each.

        Returns seconds from each arrival to its first token, and the durations of the other steps.
        """
        first, gaps = [], []
        busy = 0.0
        for arrival in arrivals:
            if now() < at + arrival:
                self._work(has=False)
                _sleep_until(at + arrival)
            began = before = now()
            self._work(has=True)
            for number in range(tokens):
                self._one(kind, None)
                ended = now()
                if number:
                    gaps.append(ended - before)
                else:
                    first.append(ended - at - arrival)
                before = ended
            busy += before - began
        self._work(has=False)
        return {"first": first, "gaps": gaps, "count": len(arrivals) * tokens, "busy_s": busy}

    def passes(self, count: int) -> dict[str, Any]:
        """Pass the gate so many times without a step between; return seconds of one pass, beside an empty loop."""
        gate = self._gate
        assert gate is not None
        self._work(has=True)
        began = time.perf_counter()
        for _ in range(count):
            if gate.may_begin():
                gate.begin()
                gate.end()
        took = time.perf_counter() - began
        self._work(has=False)
        began = time.perf_counter()
        for _ in range(count):
            pass
        return {"pass_s": (took - (time.perf_counter() - began)) / count}

    def _steps(self, kind: str, first: float, since: float, until: float) -> dict[str, Any]:
        _sleep_until(first)
        self._work(has=True)
        gaps = []
        before = now()
        while before < until and self._one(kind, until):
            ended = now()
            if since <= ended <= until:
                gaps.append(ended - before)
            before = ended
        self._work(has=False)
        _sleep_until(until)  # the answer costs others no time in their windows
        return {"gaps": gaps, "count": len(gaps)}

    def _one(self, kind: str, until: float | None) -> bool:
        """Make a step when the gate lets it begin. Returns False if that was not before ``until``."""
        gate = self._gate
        if gate is None:
            self._piece(kind, self._pieces[kind])
            return True
        while not gate.may_begin():
            gate.hold()
            if not gate.wait(None if until is None else max(0.0, until - now())):
                return False
        gate.begin()
        try:
            self._piece(kind, self._pieces[kind])
        finally:
            gate.end()
        return True

    def _work(self, *, has: bool) -> None:
        if self._gate is not None:
            self._gate.work(has=has)


def _sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - now()))


def main() -> None:
    """Run the role given on the command line."""
    play({"steps": steps})
