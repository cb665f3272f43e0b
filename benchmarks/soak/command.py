"""The soak: 200 clients that publish, read and die at random for two minutes, then an exact count of the rest.

    python benchmarks soak [--seconds 120] [--processes 8] [--old 2] [--clients 40] [--disrupt 6] [--out FILE]
    make soak-hour

Starts processes with many clients each (``soak/worker.py``). About every second one of them gets SIGKILL, and a new one
is started. ``--old`` of them run on the wooly of protocol 1, from the history of this repository. Between them, store,
keeper and catalog are killed, the catalog is paused, and the store is replaced as by ``wooly upgrade``
(``soak/disruptions.py``). The store asks its clients to swap out, at random (``soak/asking``). Always ends: every
process has a deadline, and is killed some time after it. Then the store must have exactly:

* no client, no reader, no publisher, no waiter, and no turn taken;
* as many segments and bytes as its status says, and every committed model correct to the last byte;
* after all models are removed, no segments, and the descriptors that it had before.

``--growth`` limits the growth of the store's own memory. The slopes of the memory and descriptors of store and keeper
are stored (``soak/trend.py``). Any violation is an error: exit code 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import MIB
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.processes import BENCHMARKS, Child
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import Usage, catalog_ready, usage
from benchmarks.soak.count import LeftoverError, check, wait_for_keeper
from benchmarks.soak.disruptions import Disruptions
from benchmarks.soak.trend import Sample, Trend
from shared_store.base.errors import WoolyError
from shared_store.base.status import Status

PROTOCOL_1 = "e634cb3"
"""The last commit whose clients speak protocol 1."""
ASKING = Path(__file__).parent / "asking"
"""A folder for ``PYTHONPATH``, which makes stores ask their clients."""
LONGEST_WARM_UP_S = 60.0
"""Of a store and a keeper that are observed; less in a short soak."""
GRACE_S = 60.0
"""After the deadline; then remaining processes are killed, which is an error."""


@dataclass(frozen=True)
class Settings:
    """What runs in a soak.

    Attributes:
        seconds: duration of the load.
        processes: number of processes at the same time.
        old: those of them that run on the wooly of protocol 1.
        clients: clients in each process.
        pause: mean seconds that a client pauses between two connections.
        every: mean seconds between two kills of processes.
        disrupt: mean seconds between two disruptions of the store; 0 disables them.
        seed: seed of all random choices.
        growth: limit, in bytes, for the growth of the store's anonymous memory.
    """

    seconds: float
    processes: int
    clients: int
    seed: int
    growth: int
    old: int = 0
    pause: float = 0.0
    every: float = 1.0
    disrupt: float = 0.0


@dataclass
class Load:
    """The processes of clients, and their counts. ``history``: packages of protocol 1; None without them."""

    node: Node
    settings: Settings
    deadline: float
    history: Path | None
    counts: Counter[str] = field(default_factory=Counter)
    running: list[tuple[Child, bool]] = field(default_factory=list)
    started: int = 0
    killed: int = 0

    def start(self, *, old: bool) -> None:
        """Start a process that runs until the deadline; with ``old``, on the wooly of protocol 1."""
        self.started += 1
        seconds = max(0.0, self.deadline - time.monotonic())
        job = {
            "seed": self.settings.seed + self.started,
            "clients": self.settings.clients,
            "seconds": seconds,
            "pause_s": self.settings.pause,
            "disrupted": self.settings.disrupt > 0,
        }
        environment = {"PYTHONPATH": _path(self.history)} if old and self.history is not None else {}
        child = self.node.launch(f"clients {self.started}", "clients", job, **environment)
        self.running.append((child, old))

    def start_all(self) -> None:
        """Start all processes, those of this version first."""
        for number in range(self.settings.processes):
            self.start(old=number >= self.settings.processes - self.settings.old)

    def kill_one(self, chance: random.Random) -> None:
        """Send SIGKILL to a process while its clients are busy, and start one of its kind.

        The first one is never killed, so that it counts what happens to clients all the time.
        """
        for process, _ in self.running:
            if process.has_event():  # early, so an error
                self._count(process)
        victim, old = self.running.pop(chance.randrange(1, len(self.running)))
        code = victim.kill()
        if code != -signal.SIGKILL:
            raise LeftoverError(f"a process of clients exited by itself, with {code}")
        self.killed += 1
        self.start(old=old)

    def finish(self) -> None:
        """Wait for all processes, and add their counts. Kills the remaining ones on an error."""
        try:
            for process, _ in self.running:
                self._count(process)
        finally:
            self.end()

    def end(self) -> None:
        """Kill all remaining processes."""
        for process, _ in self.running:
            process.kill()

    def _count(self, process: Child) -> None:
        report = process.wait("counts", max(1.0, self.deadline + GRACE_S - time.monotonic()))
        self.counts.update(report["counts"])
        if report["unexpected"]:
            raise LeftoverError(f"a client had an unexpected error: {report['unexpected'][0]}")


def soak(settings: Settings) -> dict[str, Any]:
    """Run the soak, and return its figures.

    Raises:
        LeftoverError: Something is left over, lost or wrong.
    """
    chance = random.Random(settings.seed)
    with Node("soak-worker") as node:
        history = _unpacked(node.scratch / "protocol-1") if settings.old else None
        with _asking():
            node.start()
        disruptions = Disruptions(node, random.Random(settings.seed))
        with node.session() as session:
            catalog_ready(session)
            before, began = _usage(disruptions.well()), time.monotonic()
        warm_up_s = min(LONGEST_WARM_UP_S, settings.seconds / 12)
        trends = {"store": Trend(warm_up_s), "keeper": Trend(warm_up_s)}
        load = Load(node, settings, began + settings.seconds, history)
        most_clients = 0
        try:
            load.start_all()
            disruption = _later(chance, settings.disrupt)
            while time.monotonic() < load.deadline:
                wait = chance.uniform(0.5, 1.5) * settings.every
                time.sleep(min(wait, max(0.0, load.deadline - time.monotonic())))
                most_clients = max(most_clients, _observe(node, trends))
                if time.monotonic() < load.deadline - 3 * settings.every:  # the last ones report their counts
                    load.kill_one(chance)
                    if time.monotonic() > disruption:
                        with _asking():  # an upgrade starts a store
                            disruptions.disrupt()
                        disruption = _later(chance, settings.disrupt)
            busy = _usage(disruptions.well())
        except BaseException:
            load.end()
            raise
        load.finish()
        disruptions.well()
        with node.session() as session:
            catalog_ready(session)
            figures = check(session, before["store"].fds)
            wait_for_keeper(session, before["keeper"].fds)
            after = _usage(session.status())
            counters = session.status().counters
        grown = after["store"].anonymous - before["store"].anonymous
        if grown > settings.growth:
            raise LeftoverError(f"the store's own memory grew by {grown} bytes; the limit is {settings.growth}")
        asked = _asked(node.directory / "store.log")
        if asked.get("unanswered"):
            raise LeftoverError(f"{asked['unanswered']} requests of the store were not answered in time")
        return {
            "seconds": round(time.monotonic() - began, 1),
            "clients_at_a_time": most_clients,
            "processes_started": load.started,
            "processes_killed": load.killed,
            "processes_of_protocol_1": settings.old if history is not None else 0,
            **figures,
            "disruptions": dict(sorted(disruptions.counts.items())),
            "disruptions_longest_s": dict(sorted(disruptions.seconds.items())),
            "asked": asked,
            **{
                role: {
                    **({"cpu_s": round(busy[role].cpu_s, 2)} if role == "store" else {}),
                    **{
                        f"{name}_{when}": getattr(found[role], name)
                        for name in ("anonymous", "fds")
                        for when, found in (("before", before), ("busy", busy), ("after", after))
                    },
                    "slope": trends[role].figures(),
                }
                for role in trends
            },
            "counters": {name: getattr(counters, name) for name in counters.__struct_fields__},
            "counts_of_those_not_killed": dict(sorted(load.counts.items())),
        }


def _usage(status: Status) -> dict[str, Usage]:
    """Return the usage of store and keeper."""
    assert status.keeper is not None
    return {"store": usage(status.store.pid), "keeper": usage(status.keeper.pid)}


def _observe(node: Node, trends: dict[str, Trend]) -> int:
    """Add samples of store and keeper, and return the number of clients. Nothing while the store is disrupted."""
    try:
        status = node.status()
        found = _usage(status)
    except (WoolyError, OSError, AssertionError):
        return 0
    connected = len({client.id for client in status.clients}) - 1
    for role, one in found.items():
        pid = status.store.pid if role == "store" or status.keeper is None else status.keeper.pid
        load = one.segments + (len(status.clients) if role == "store" else 0)
        trends[role].add(Sample(time.monotonic(), pid, one.anonymous, one.fds - load))
    return connected


def _later(chance: random.Random, mean_s: float) -> float:
    """Return the time of the next disruption; never for 0."""
    return time.monotonic() + chance.uniform(0.5, 1.5) * mean_s if mean_s else float("inf")


def _path(first: Path) -> str:
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Make stores that are started in this block, and their successors, ask their clients."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _path(ASKING)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _unpacked(place: Path) -> Path | None:
    """Unpack wooly's packages of protocol 1; None if there is no history."""
    asked = ["git", "-C", str(BENCHMARKS.parent), "archive", PROTOCOL_1, "shared_store"]
    archive = subprocess.run(asked, capture_output=True, check=False)
    if archive.returncode != 0:
        return None
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(place, filter="data")
    return place


def _asked(log: Path) -> dict[str, int]:
    """Return how the stores' requests were answered, from their log."""
    found: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if "soak: asked " in line:
            found[line.rpartition("soak: asked ")[2]] += 1
    return dict(sorted(found.items()))


def main() -> None:
    """Run the soak, and write the results."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120.0, help="duration of the load (default 120)")
    options.add_argument("--processes", type=int, default=8, help="processes at the same time (default 8)")
    options.add_argument("--old", type=int, default=2, help="processes with clients of protocol 1 (default 2)")
    options.add_argument("--clients", type=int, default=40, help="clients in each process (default 40)")
    options.add_argument("--pause", type=float, default=0.0, help="mean seconds between two connections (default 0)")
    options.add_argument("--every", type=float, default=1.0, help="mean seconds between two kills (default 1)")
    options.add_argument(
        "--disrupt", type=float, default=6.0, help="mean seconds between two disruptions; 0: none (default 6)"
    )
    options.add_argument("--seed", type=int, default=1, help="seed of all random choices (default 1)")
    options.add_argument(
        "--growth", type=int, default=64 * MIB, help="limit for the growth of the store's own memory, in bytes"
    )
    options.add_argument(
        "--out", type=Path, default=RESULTS / "soak.json", help="result file (default benchmarks/results/soak.json)"
    )
    arguments = vars(options.parse_args())
    out = arguments.pop("out")
    found = soak(Settings(**arguments))
    versions = {**stamp(), **host(), **wooly(), "load_average": load_average()}
    write(out, {"versions": versions, "load": {**arguments}, **found})
    print(json.dumps(found))
