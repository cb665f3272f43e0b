"""The parity matrix: does what is shared compute what stock vLLM computes, for everything that people serve?

A row is a model, a quantization, a dtype, and whether CUDA graphs are used (``parity_rows.py``). For each, three real
vLLM engines answer the same prompts: stock, a publisher, and a reader beside the living publisher; each in a process
that has rows of its kind one after the other (dense and sparse models do not share one). Answers are greedy tokens, or
embeddings, and are compared bit by bit.

    python benchmarks/parity.py [--list] [--rows REGEX] [--missing] [--lanes 4] [--budget-s 540]
    python benchmarks/parity.py --markdown [--check]

equal         both answer as stock does, and the reader maps the weights: ``shared_fraction`` of them.
refused       both answer as stock does, but wooly does not share this model, and says why.
differs       an answer is not stock's. It should never be seen.
failed        stock answers, and an engine with wooly does not.
stock-failed  stock vLLM itself does not run this row on this machine.

Rows that stand for another machine are left out: one without a GPU runs those that are marked for it. Results are
written after each row, into ``--output``, where rows that do not run now keep what they had. Models are made in
``--models`` where they are not there yet, without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import parity_page
from bench_gpu import commit
from checkpoints import CACHE
from gpu_processes import MIB, Child, ChildError, Node, end_all, nvidia_smi
from parity_rows import ROWS, Row

HERE = Path(__file__).resolve().parent
ENGINE = HERE / "parity_engine.py"
OUTPUT = HERE / "results" / "parity.json"
PAGE = HERE.parent / "docs" / "parity.md"
ROLES = {"stock": "auto", "publisher": "wooly", "reader": "wooly"}
"""The engines of a row, in the order in which they load, and their load formats."""
LEFT_MIB = 1024
"""A process whose engines leave more GPU memory behind than this has no more rows."""
DISTINCT = 10
"""Tokens that answers must have more of, so that their equality means something."""


@dataclass(frozen=True)
class Outcome:
    """What came of a row."""

    status: str
    reason: str = ""
    shared_fraction: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Where rows run. ``driver`` is empty where there is no GPU."""

    device: str
    driver: str
    on_gpu: bool


class Engines:
    """The processes of one lane: one for each role, as long as the rows are of one kind; and their store."""

    def __init__(self, machine: Machine, device: str, logs: Path | None, *, unproven: bool) -> None:
        """``device``: what ``CUDA_VISIBLE_DEVICES`` says to them; ``logs``: a folder that keeps what they print.

        ``unproven``: as the option of wooly's loader.
        """
        self._machine, self._device, self._logs, self._unproven = machine, device, logs, unproven
        self._node = Node(ENGINE)
        self._living: dict[str, Child] = {}
        self._sparse: bool | None = None
        self.versions: dict[str, str] = {}
        self.used = False

    def compare(self, row: Row, checkpoint: Path, timeout_s: float) -> Outcome:
        """Have the row's engines answer, stock first."""
        if row.sparse != self._sparse:
            self.end()
            self._sparse = row.sparse
        self._start(ROLES)
        deadline = time.monotonic() + timeout_s
        answers: dict[str, list[dict[str, Any]]] = {}
        role = "stock"
        try:
            answers["stock"] = [self._answer(row, "stock", checkpoint, deadline), self._free("stock", deadline)]
            for role in ("publisher", "reader"):
                answers[role] = [self._answer(row, role, checkpoint, deadline)]
            for role in ("reader", "publisher"):
                answers[role].append(self._free(role, deadline))
        except ChildError as error:
            self.end([role] if role == "stock" else ["publisher", "reader"])
            return Outcome("stock-failed" if role == "stock" else "failed", _brief(str(error)))
        self._forget_models()
        self.used = True
        return judge(answers, embeds=row.embeds)

    def renew(self) -> None:
        """Go on with processes and a store that no row has used yet."""
        self.close()
        self._node = Node(ENGINE)

    def close(self) -> None:
        """End all processes, and the store."""
        self.end()
        self._node.close()

    def end(self, roles: Iterable[str] = ROLES) -> None:
        """End processes; the next row starts them again."""
        end_all(self._living.pop(role) for role in list(roles) if role in self._living)
        self.used = bool(self._living) and self.used
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            for log in self._node.scratch.glob("*.log"):
                shutil.copyfile(log, self._logs / f"{self._node.scratch.name}-{log.name}")

    def _start(self, roles: Iterable[str]) -> None:
        """Those that are missing are started together: importing vLLM takes them longest."""
        missing = [role for role in roles if role not in self._living]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self._machine.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = self._device
        for role in missing:
            self._living[role] = self._node.start(role, role, {}, **environment)
        for role in missing:
            self.versions = self._living[role].hear("imported", 600)["versions"]

    def _answer(self, row: Row, role: str, checkpoint: Path, deadline: float) -> dict[str, Any]:
        job = {
            "model": str(checkpoint),
            "load_format": ROLES[role],
            "extra": {"unproven": True} if self._unproven and ROLES[role] == "wooly" else {},
            "settings": row.settings(on_gpu=self._machine.on_gpu),
            "embeds": row.embeds,
        }
        return self._living[role].ask(json.dumps(job), "answered", deadline - time.monotonic())

    def _free(self, role: str, deadline: float) -> dict[str, Any]:
        freed = self._living[role].ask("free", "freed", deadline - time.monotonic())
        if freed["left_bytes"] > LEFT_MIB * MIB:
            self.end([role])
        return freed

    def _forget_models(self) -> None:
        """So that the next row publishes, whatever it has in common with this one."""
        from shared_store.base.errors import StoreUnavailableError
        from shared_store.client.session import Session

        with (
            contextlib.suppress(StoreUnavailableError),  # nothing was shared yet, so no store was started
            Session.connect(self._node.runtime_dir, autostart=False) as session,
        ):
            for model in session.status().models:
                if model.state == "committed" and not model.readers:
                    session.remove(model.key)


def judge(answers: Mapping[str, list[dict[str, Any]]], *, embeds: bool) -> Outcome:
    """What the answers of a row's engines say: each has answered twice."""
    stock, again = (each["answer"] for each in answers["stock"])
    refused = [reason for role in ("publisher", "reader") for reason in answers[role][0]["refused"]]
    for role in ("publisher", "reader"):
        for number, each in enumerate(answers[role]):
            if each["answer"] != (stock, again)[number]:
                unsteady = "" if stock == again else "; but stock vLLM does not answer twice alike either"
                not_shared = f"; not shared: {refused[0]}" if refused else ""
                return Outcome("differs", f"answer {number + 1} of the {role} is not stock's{unsteady}{not_shared}")
    if not embeds and len({token for tokens in stock for token in tokens}) <= DISTINCT:
        return Outcome("failed", "the answers hardly vary, so that they prove nothing")
    if refused:
        return Outcome("refused", refused[0])
    lease = answers["reader"][0]
    if lease["role"] != "reader" or not lease["mapped_bytes"]:
        said = {name: value for name, value in lease.items() if name in ("role", "mapped_bytes", "store")}
        return Outcome("failed", f"the reader maps nothing, and does not say why: {said}")
    mapped, private = lease["mapped_bytes"], lease["private_bytes"]
    return Outcome("equal", shared_fraction=round(mapped / (mapped + private), 4))


def _brief(text: str) -> str:
    """One line of an error and the end of a log."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ended = len(lines) > 1 and (" ended with exit code " in lines[0] or " within " in lines[0])
    return f"{lines[0]}: {lines[-1]}" if ended else lines[0]


class Results:
    """The file of results: what rows gave, by machine and vLLM version. Lanes write to it one after the other."""

    def __init__(self, file: Path, machine: Machine) -> None:
        """``machine``: where the results come from that are written."""
        self._file, self._machine, self._lock = file, machine, threading.Lock()

    def has(self, row: Row) -> bool:
        """Whether there is a result of a row on this kind of machine."""
        return any(device == self._machine.device and name == row.name for device, _, name in self._read())

    def _read(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """What the file has, but for rows that there no longer are."""
        old = json.loads(self._file.read_text(encoding="utf-8"))["raw"] if self._file.exists() else []
        return {self._key(each): each for each in old if each["row"] in ROWS}

    def put(self, row: Row, outcome: Outcome, versions: Mapping[str, str], seconds: float) -> None:
        """Write a row's result, in the place of what there was."""
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
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            **asdict(outcome),
            "seconds": round(seconds, 1),
        }
        with self._lock:
            have = self._read() | {self._key(found): found}
            order = {name: number for number, name in enumerate(ROWS)}
            rows = [have[key] for key in sorted(have, key=lambda key: (key[0], key[1], order[key[2]]))]
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._file.with_suffix(".new")
            fresh.write_text(json.dumps({**_counts(rows), "raw": rows}, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self._file)

    @staticmethod
    def _key(found: Mapping[str, Any]) -> tuple[str, str, str]:
        return found["device"], found["versions"].get("vllm", ""), found["row"]


def _counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows came out how, on GPUs and on CPUs."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        kind = counts.setdefault("gpu" if row["driver"] else "cpu", {})
        kind[row["status"]] = kind.get(row["status"], 0) + 1
    return counts


def machine() -> Machine:
    """The first visible GPU, or the processor."""
    try:
        return Machine(nvidia_smi("name"), nvidia_smi("driver_version"), on_gpu=True)
    except (OSError, subprocess.SubprocessError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return Machine(next(line for line in lines if "model name" in line).split(":")[1].strip(), "", on_gpu=False)


class Lane(threading.Thread):
    """Takes row after row, of one kind as long as there are any, until none is left or the time is over."""

    def __init__(self, run: Run, device: str) -> None:
        super().__init__(daemon=True)
        self._run, self._device = run, device

    def run(self) -> None:
        """Compare rows."""
        engines = Engines(self._run.machine, self._device, self._run.logs, unproven=self._run.unproven)
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
        outcome = engines.compare(row, checkpoint, self._run.timeout_s)
        if outcome.status not in ("equal", "refused") and engines.used:
            # What rows before it left in the processes has no part in a result: once more, without that.
            engines.renew()
            outcome = engines.compare(row, checkpoint, self._run.timeout_s)
        return outcome


class Run:
    """The rows of one run, for its lanes."""

    def __init__(self, rows: Iterable[Row], results: Results, machine: Machine, arguments: argparse.Namespace) -> None:
        self.machine, self.logs, self.timeout_s = machine, arguments.logs, arguments.timeout_s
        self.unproven: bool = arguments.unproven
        self._rows, self._results, self._cache = list(rows), results, arguments.models
        self._count = len(self._rows)
        self._ends = time.monotonic() + arguments.budget_s
        self._lock, self._making = threading.Lock(), threading.Lock()
        self.outcomes: queue.SimpleQueue[tuple[Row, Outcome]] = queue.SimpleQueue()

    def next(self, *, sparse: bool | None) -> Row | None:
        """A row that nobody has begun; of that kind, if there is one."""
        with self._lock:
            if not self._rows or time.monotonic() > self._ends:
                return None
            same = (number for number, row in enumerate(self._rows) if row.sparse == sparse)
            return self._rows.pop(next(same, 0))

    def checkpoint(self, row: Row) -> Path:
        """A row's checkpoint. One at a time is made."""
        with self._making:
            return row.checkpoint(self._cache)

    def done(self, row: Row, outcome: Outcome, versions: Mapping[str, str], seconds: float) -> None:
        """Write a result down, and tell it."""
        self._results.put(row, outcome, versions, seconds)
        self.outcomes.put((row, outcome))
        shared = f" {100 * outcome.shared_fraction:.1f}% shared" if outcome.status == "equal" else ""
        done = self.outcomes.qsize()
        print(
            f"[{done}/{self._count}] {row.name}: {outcome.status}{shared} {outcome.reason} ({seconds:.0f} s)",
            flush=True,
        )

    def left(self) -> list[str]:
        """Rows that were not begun."""
        return [row.name for row in self._rows]


def run(rows: Iterable[Row], here: Machine, results: Results, arguments: argparse.Namespace) -> Run:
    """Compare rows in lanes."""
    whole = Run(rows, results, here, arguments)
    devices = arguments.devices.split(",")
    lanes = [Lane(whole, devices[number % len(devices)]) for number in range(arguments.lanes)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return whole


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), metavar="REGEX", help="found in their names")
    parser.add_argument("--list", action="store_true", help="print the names of the rows of this machine, and end")
    parser.add_argument("--missing", action="store_true", help="only rows without a result on this kind of machine")
    parser.add_argument("--lanes", type=int, default=1, help="rows that run at once, with three engines each")
    parser.add_argument("--timeout-s", type=float, default=400, help="for one row")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no row is begun after that")
    parser.add_argument(
        "--devices",
        default=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        help="GPUs that the lanes take in turn, as CUDA_VISIBLE_DEVICES names them, which they are by default",
    )
    parser.add_argument(
        "--unproven",
        action="store_true",
        help="also share layers whose method is in no table of wooly_vllm/loading/methods.py, to compare them",
    )
    parser.add_argument("--models", type=Path, default=CACHE, help="folder of the checkpoints")
    parser.add_argument("--logs", type=Path, help="folder that keeps what the engines print")
    parser.add_argument("--output", "--json", type=Path, default=OUTPUT, help="file of the results")
    parser.add_argument("--markdown", action="store_true", help="run nothing; write the page from the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="file of the page")
    parser.add_argument("--check", action="store_true", help="with --markdown: exit with 1 if the page is stale")
    return parser.parse_args()


def main() -> None:
    """Run rows, list them, or write the page."""
    arguments = _arguments()
    if arguments.markdown:
        parity_page.write(arguments.output, arguments.page, check=arguments.check)
        return
    here = machine()
    rows = [row for row in ROWS.values() if arguments.rows.search(row.name) and (row.gpu if here.on_gpu else row.cpu)]
    results = Results(arguments.output, here)
    if arguments.missing:
        rows = [row for row in rows if not results.has(row)]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers, which makes the models
    whole = run(rows, here, results, arguments)
    if left := whole.left():
        print(f"not begun: {', '.join(left)}", flush=True)
    bad = []
    while not whole.outcomes.empty():
        row, outcome = whole.outcomes.get()
        bad += [row.name] if outcome.status in ("differs", "failed") else []
    if bad:
        sys.exit(f"differs or failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
