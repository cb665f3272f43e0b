"""Lanes: threads that compare the rows of a run, each with engines of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parity.engines import Engines
from benchmarks.parity.judge import Outcome
from benchmarks.parity.machine import Machine
from benchmarks.parity.results import Results
from benchmarks.parity.rows import Row


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        models: Directory of the checkpoints.
        logs: Directory to copy the engines' logs to, if any.
        timeout_s: Limit for one row, in seconds.
        budget_s: No row begins after this time, in seconds.
        unproven: The option of wooly's loader.
    """

    models: Path
    logs: Path | None
    timeout_s: float
    budget_s: float
    unproven: bool


class Run:
    """The rows of one run, and their outcomes. Thread-safe."""

    def __init__(self, rows: Iterable[Row], results: Results, machine: Machine, options: Options) -> None:
        self.machine, self.options = machine, options
        self._rows, self._results = list(rows), results
        self._count = len(self._rows)
        self._ends = time.monotonic() + options.budget_s
        self._lock, self._making = threading.Lock(), threading.Lock()
        self.outcomes: queue.SimpleQueue[tuple[Row, Outcome]] = queue.SimpleQueue()

    def next(self, *, sparse: bool | None) -> Row | None:
        """Take a row, preferably of the given kind; None if there is none or the time is over."""
        with self._lock:
            if not self._rows or time.monotonic() > self._ends:
                return None
            same = (number for number, row in enumerate(self._rows) if row.sparse == sparse)
            return self._rows.pop(next(same, 0))

    def checkpoint(self, row: Row) -> Path:
        """Return the checkpoint of a row. Makes one at a time."""
        with self._making:
            return row.checkpoint(self.options.models)

    def done(self, row: Row, outcome: Outcome, versions: Mapping[str, str], seconds: float) -> None:
        """Store and print an outcome."""
        self._results.put(row, outcome, versions, seconds)
        self.outcomes.put((row, outcome))
        shared = f" {100 * outcome.shared_fraction:.1f}% shared" if outcome.status == "equal" else ""
        done = self.outcomes.qsize()
        print(
            f"[{done}/{self._count}] {row.name}: {outcome.status}{shared} {outcome.reason} ({seconds:.0f} s)",
            flush=True,
        )

    def left(self) -> list[str]:
        """Return the names of rows that did not begin."""
        return [row.name for row in self._rows]


class Lane(threading.Thread):
    """Compares rows, of the same kind as long as there are any, until none is left or the time is over."""

    def __init__(self, run: Run, device: str) -> None:
        super().__init__(daemon=True)
        self._run, self._device = run, device

    def run(self) -> None:
        """Compare rows."""
        options = self._run.options
        engines = Engines(self._run.machine, self._device, options.logs, unproven=options.unproven)
        sparse: bool | None = None
        try:
            while (row := self._run.next(sparse=sparse)) is not None:
                sparse = row.sparse
                began = time.monotonic()
                outcome = self._compare(engines, row)
                self._run.done(row, outcome, engines.versions, time.monotonic() - began)
        finally:
            engines.close()

    def _compare(self, engines: Engines, row: Row) -> Outcome:
        try:
            checkpoint = self._run.checkpoint(row)
        except Exception as error:  # noqa: BLE001 - a model that cannot be made is a result
            return Outcome("stock-failed", f"the checkpoint cannot be made: {type(error).__name__}: {error}")
        outcome = engines.compare(row, checkpoint, self._run.options.timeout_s)
        if outcome.status not in ("equal", "refused") and engines.used:
            # Exclude the effect of earlier rows on the processes: repeat the row in new ones.
            engines.renew()
            outcome = engines.compare(row, checkpoint, self._run.options.timeout_s)
        return outcome


def run_lanes(run: Run, devices: Iterable[str]) -> None:
    """Compare the rows of a run in one lane per device."""
    lanes = [Lane(run, device) for device in devices]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
