"""The soak: 200 clients that publish, read and die at random for two minutes, then an exact count of the rest.

    python benchmarks soak [--seconds 120] [--processes 8] [--clients 40] [--seed 1] [--out FILE]

Starts processes with many clients each (``soak/worker.py``). About every second one of them gets SIGKILL, and a new one
is started. Always ends: every process has a deadline, and is killed some time after it. Then the store must have
exactly:

* no client, no reader, no publisher, no waiter, and no turn taken;
* as many segments and bytes as its status says, and every committed model correct to the last byte;
* after all models are removed, no segments, and the descriptors that it had before.

``--growth`` limits the growth of the store's own memory. Any violation is an error: exit code 1.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import MIB
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import catalog_ready
from benchmarks.soak.count import LeftoverError, check

KILL_EVERY_S = (0.5, 1.5)
GRACE_S = 60.0
"""After the deadline; then remaining processes are killed, which is an error."""


@dataclass
class Load:
    """The processes of clients, and their counts."""

    node: Node
    clients: int
    seed: int
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    running: list[Child] = field(default_factory=list)
    started: int = 0
    killed: int = 0

    def start(self) -> None:
        """Start a process that runs until the deadline."""
        self.started += 1
        seconds = max(0.0, self.deadline - time.monotonic())
        job = {"seed": self.seed + self.started, "clients": self.clients, "seconds": seconds}
        self.running.append(self.node.launch(f"clients {self.started}", "clients", job))

    def kill_one(self, chance: random.Random) -> None:
        """Send SIGKILL to a process while its clients are busy."""
        victim = self.running.pop(chance.randrange(len(self.running)))
        code = victim.kill()
        if code != -signal.SIGKILL:
            raise LeftoverError(f"a process of clients exited by itself, with {code}")
        self.killed += 1

    def finish(self) -> None:
        """Wait for all processes, and add their counts. Kills the remaining ones on an error."""
        try:
            for process in self.running:
                report = process.wait("counts", max(1.0, self.deadline + GRACE_S - time.monotonic()))
                self.counts.update(report["counts"])
                if report["unexpected"]:
                    raise LeftoverError(f"a client had an unexpected error: {report['unexpected'][0]}")
        finally:
            self.end()

    def end(self) -> None:
        """Kill all remaining processes."""
        for process in self.running:
            process.kill()


def soak(*, seconds: float, processes: int, clients: int, seed: int, growth: int) -> dict[str, Any]:
    """Run the soak, and return its figures.

    Args:
        seconds: Duration of the load.
        processes: Number of processes at the same time.
        clients: Clients in each of them.
        seed: Seed of all random choices.
        growth: Limit, in bytes, for the growth of the store's anonymous memory.

    Raises:
        LeftoverError: Something is left over, lost or wrong.
    """
    chance = random.Random(seed)
    with Node("soak-worker") as node:
        node.start()
        with node.session() as session:
            catalog_ready(session)
            before, began = node.usage(), time.monotonic()
            load = Load(node, clients, seed, began + seconds)
            most_clients = 0
            try:
                for _ in range(processes):
                    load.start()
                while time.monotonic() < load.deadline:
                    time.sleep(min(chance.uniform(*KILL_EVERY_S), max(0.0, load.deadline - time.monotonic())))
                    most_clients = max(most_clients, len({client.id for client in session.status().clients}) - 1)
                    if time.monotonic() < load.deadline - 2 * max(KILL_EVERY_S):  # the last ones report their counts
                        load.kill_one(chance)
                        load.start()
                busy = node.usage()
            except BaseException:
                load.end()
                raise
            load.finish()
            figures = check(session, before.fds)
            after = node.usage()
            grown = after.anonymous - before.anonymous
            if grown > growth:
                raise LeftoverError(f"the store's own memory grew by {grown} bytes; the limit is {growth}")
            counters = session.status().counters
            return {
                "seconds": round(time.monotonic() - began, 1),
                "seed": seed,
                "clients_at_a_time": most_clients,
                "processes_started": load.started,
                "processes_killed": load.killed,
                **figures,
                "store": {
                    "cpu_s": round(busy.cpu_s - before.cpu_s, 2),
                    "anonymous_before": before.anonymous,
                    "anonymous_busy": busy.anonymous,
                    "anonymous_after": after.anonymous,
                    "fds_before": before.fds,
                    "fds_busy": busy.fds,
                    "fds_after": after.fds,
                },
                "counters": {name: getattr(counters, name) for name in counters.__struct_fields__},
                "counts_of_those_not_killed": dict(sorted(load.counts.items())),
            }


def main() -> None:
    """Run the soak, and write the results."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120.0, help="duration of the load (default 120)")
    options.add_argument("--processes", type=int, default=8, help="processes at the same time (default 8)")
    options.add_argument("--clients", type=int, default=40, help="clients in each process (default 40)")
    options.add_argument("--seed", type=int, default=1, help="seed of all random choices (default 1)")
    options.add_argument(
        "--growth", type=int, default=64 * MIB, help="limit for the growth of the store's own memory, in bytes"
    )
    options.add_argument(
        "--out", type=Path, default=RESULTS / "soak.json", help="result file (default benchmarks/results/soak.json)"
    )
    arguments = vars(options.parse_args())
    out = arguments.pop("out")
    found = soak(**arguments)
    versions = {**stamp(), **host(), **wooly(), "load_average": load_average()}
    write(out, {"versions": versions, "load": {**arguments}, **found})
    print(json.dumps(found))
