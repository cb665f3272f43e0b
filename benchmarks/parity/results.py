"""The result file of the parity matrix: outcomes of rows by machine and vLLM version."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import commit, today
from benchmarks.harness.results import read, write
from benchmarks.parity.judge import Outcome
from benchmarks.parity.machine import Machine
from benchmarks.parity.rows import ROWS, Row

_Key = tuple[str, str, str]
"""Device, vLLM version and row."""


class Results:
    """The result file. Rows that do not run keep their results; rows that no longer exist are dropped. Thread-safe."""

    def __init__(self, file: Path, machine: Machine) -> None:
        """``machine`` is the origin of new results."""
        self._file, self._machine, self._lock = file, machine, threading.Lock()

    def has(self, row: Row) -> bool:
        """Return whether there is a result of a row on this kind of machine."""
        return any(device == self._machine.device and name == row.name for device, _, name in self._read())

    def put(self, row: Row, outcome: Outcome, versions: Mapping[str, str], seconds: float) -> None:
        """Store the outcome of a row, in place of an older one."""
        found = {
            "row": row.name,
            "model": row.model,
            "quantization": row.quantization,
            "dtype": row.dtype,
            "graphs": row.graphs,
            "arguments": row.arguments,
            "device": self._machine.device,
            "driver": self._machine.driver,
            "versions": dict(versions),
            "commit": commit(),
            "date": today(),
            **asdict(outcome),
            "seconds": round(seconds, 1),
        }
        with self._lock:
            known = self._read() | {_key(found): found}
            order = {name: number for number, name in enumerate(ROWS)}
            rows = [known[key] for key in sorted(known, key=lambda key: (key[0], key[1], order[key[2]]))]
            write(self._file, {**_counts(rows), "raw": rows})

    def _read(self) -> dict[_Key, dict[str, Any]]:
        return {_key(each): each for each in read(self._file).get("raw", []) if each["row"] in ROWS}


def _key(found: Mapping[str, Any]) -> _Key:
    return found["device"], found["versions"].get("vllm", ""), found["row"]


def _counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the number of rows by status, on GPUs and on CPUs."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        kind = counts.setdefault("gpu" if row["driver"] else "cpu", {})
        kind[row["status"]] = kind.get(row["status"], 0) + 1
    return counts
