"""The soak: 200 clients that publish, read and die at random for two minutes, and then an exact count of what is left.

    python benchmarks/soak.py [--seconds 120] [--processes 8] [--clients 40] [--seed 1] [--out FILE]

Processes with many clients each (``soak_clients.py``); one of them is killed with SIGKILL every second or so, and
another comes in its place. It ends by itself: every process has a deadline, and is killed a while after it. Then the
store must have, to the number:

* no client, no reader, no publisher, nobody in line for a model or a lease;
* as many segments and bytes as its status says, and every committed model right to the last byte;
* none of either, and the fds that it had before, once the models are removed.

How much the store's own memory grew is bounded, by ``--growth``. Any of these not met is an error: exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_clients import LEASES
from store_node import HERE, StoreNode, mapped, open_model, versions, wait_for_status, wait_until

from shared_store.base.digest import digest_at
from shared_store.base.errors import TimedOutError
from shared_store.base.manifest import decode
from shared_store.client.session import Session
from shared_store.memory import Access

MIB = 1 << 20
KILL_EVERY_S = (0.5, 1.5)
GRACE_S = 60.0  # after the deadline; then whoever is left is killed, and that is an error
LEFT_ALONE_S = 1.0


class LeftoverError(Exception):
    """The store has something that it should not have, or has lost something."""


@dataclass
class Load:
    """The processes of clients: how they are kept going, and what they said."""

    node: StoreNode
    clients: int
    seed: int
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: int = 0
    killed: int = 0

    def start(self) -> None:
        """One process more, to run until the deadline."""
        self.started += 1
        seconds = max(0.0, self.deadline - time.monotonic())
        arguments = [str(self.node.directory), str(self.seed + self.started), str(self.clients), str(seconds)]
        command = [sys.executable, str(HERE / "soak_clients.py"), *arguments]
        # Where scripts do not find what lies beside them (PYTHONSAFEPATH), these do.
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.running.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))

    def kill_one(self, chance: random.Random) -> None:
        """SIGKILL, in the middle of whatever its clients do."""
        victim = self.running.pop(chance.randrange(len(self.running)))
        victim.kill()
        victim.communicate()
        if victim.returncode != -9:
            raise LeftoverError(f"a process of clients ended by itself, with {victim.returncode}")
        self.killed += 1

    def finish(self) -> None:
        """Wait for all, and take in what they counted."""
        try:
            for process in self.running:
                said, _ = process.communicate(timeout=max(1.0, self.deadline + GRACE_S - time.monotonic()))
                report = json.loads(said)
                self.counts.update(report["counts"])
                if report["unexpected"]:
                    raise LeftoverError(f"a client met what it should not: {report['unexpected'][0]}")
        finally:
            self.end()

    def end(self) -> None:
        """Kill whoever is left."""
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.communicate()


def soak(*, seconds: float, processes: int, clients: int, seed: int, growth: int) -> dict[str, Any]:
    """Run it; returns the figures.

    Args:
        seconds: how long clients come and go.
        processes: at a time.
        clients: in each of them.
        seed: of all random choices.
        growth: bytes by which the store's anonymous memory may be more after it than before.

    Raises:
        LeftoverError: something is left, lost or wrong.
    """
    chance = random.Random(seed)
    with StoreNode() as node, node.session() as session:
        wait_for_status(session, lambda status: status.catalog.state == "ok", "the catalog, which has fds too")
        before, began = node.usage(), time.monotonic()
        load = Load(node, clients, seed, began + seconds)
        most_clients = 0
        try:
            for _ in range(processes):
                load.start()
            while time.monotonic() < load.deadline:
                time.sleep(min(chance.uniform(*KILL_EVERY_S), max(0.0, load.deadline - time.monotonic())))
                most_clients = max(most_clients, len({client.id for client in session.status().clients}) - 1)
                if time.monotonic() < load.deadline - 2 * max(
                    KILL_EVERY_S
                ):  # some live to the end and say what they met
                    load.kill_one(chance)
                    load.start()
            busy = node.usage()
        except BaseException:
            load.end()
            raise
        load.finish()
        figures = check(node, session, before.fds)
        after = node.usage()
        grown = after.anonymous - before.anonymous
        if grown > growth:
            raise LeftoverError(f"the store's own memory grew by {grown} bytes, and {growth} are allowed")
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


def check(node: StoreNode, session: Session, fds: int, *, patience_s: float = 30.0) -> dict[str, int]:
    """The exact count, which ends in an empty store; ``fds`` are those that it had before.

    Raises:
        LeftoverError: after ``patience_s`` there is something that should not be, or at once where it cannot go.
    """
    try:
        return _check(node, session, fds, patience_s)
    except (TimeoutError, TimedOutError) as error:
        raise LeftoverError(str(error)) from error


def _check(node: StoreNode, session: Session, fds: int, patience_s: float) -> dict[str, int]:
    status = wait_for_status(
        session, lambda status: len(status.clients) == 1, "the dead clients' connections to end", patience_s
    )
    busy = [model for model in status.models if model.readers or model.state != "committed"]
    if busy:
        raise LeftoverError(f"models that somebody reads or publishes, and nobody is there: {busy}")
    if status.totals.mapped_bytes:
        raise LeftoverError(f"{status.totals.mapped_bytes} bytes count as mapped, and nobody is there")
    (cpu,) = status.devices
    found = node.usage()
    if (found.segments, found.segment_bytes) != (cpu.segments, cpu.resident_bytes):
        raise LeftoverError(f"the process has {found}, and its status says {cpu}")
    for model in status.models:
        verify(session, model.key)
    figures = {"models_left": len(status.models), "segments_left": cpu.segments, "resident_left": cpu.resident_bytes}
    for model in status.models:
        session.remove(model.key)
    (cpu,) = session.status().devices
    if (cpu.segments, cpu.resident_bytes) != (0, 0):
        raise LeftoverError(f"the store has no models, and {cpu}")
    wait_until(lambda: node.usage().fds <= fds, f"the store to have no more than the {fds} fds that it had", patience_s)
    for number in range(LEASES):
        with session.turn(f"lease-{number}", LEFT_ALONE_S):  # at once, or somebody dead still holds it
            pass
    return figures


def verify(session: Session, model: str) -> None:
    """Every byte of a model."""
    found = open_model(session, model)
    if found is None:
        raise LeftoverError(f"{model} is committed, and was granted for publishing")
    attached, fds = found
    with mapped(attached.segments, fds, Access.READ) as mappings:
        for blob, place in zip(decode(attached.manifest).blobs, attached.places, strict=True):
            if digest_at(mappings[place.segment].address + place.offset, blob.nbytes) != blob.digest:
                raise LeftoverError(f"{model} has wrong bytes")
    session.leave(model)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--clients", type=int, default=40, help="in each process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--growth", type=int, default=64 * MIB, help="bytes that the store's own memory may grow by")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "soak.json", help="the file of the results")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    found = soak(**arguments)
    result = {"versions": versions(), "load": {**arguments}, **found}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
