"""What a store's requests cost, by the numbers of its models, blobs and connected clients.

    python benchmarks scale [--points NAME ...] [--divide N] [--out FILE]

Each point is a fresh keeper and store, with models whose blobs nobody else has, in host memory, and with clients that
are connected and read one model each. ``tenth`` has 100 models of 300 blobs and 100 clients; ``models``, ``blobs`` and
``clients`` have ten times as many of one of them; ``half`` and ``full`` have 500 and 1,000 models of 300 blobs, and as
many clients. Blobs have 512 bytes: the store's work depends on numbers, not on bytes. Then one more client measures,
with models of 300 blobs of its own at every point:

publish           open, plan, fill and commit a model
attach, leave     open a model and receive its descriptors; leave it
connection        connect, attach, and disconnect without leaving
remove            remove a model
status, scrape    ask for the snapshot; scrape the metrics

Each has ``ms``, the median of its duration, and ``cpu_ms``, CPU time of the store's process for one of them: the median
of several rounds, each with what the store does for the round afterwards, such as writing to its catalog. ``restart``
has seconds from SIGKILL until a client is greeted (``serving_s``) and until all clients have rejoined (``rejoined_s``),
and the CPU time of the new store until then (``serving_cpu_s``, ``rejoined_cpu_s``). ``loop`` has the longest callback
of the store's event loop, and the longest garbage collection, as the store measures them: from its start to the end of
the measurements (``busy``), after each restart (``restarted``), and while all clients disconnect at the same moment and
the idle store compacts (``idle``). ``cpu_ms`` is that of the callback with most CPU time: unlike durations, it does not
depend on the machine's other work.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.content import blob, key

from benchmarks.harness.arguments import parser
from benchmarks.harness.device import Device
from benchmarks.harness.figures import seconds
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.processes import end_all, wait_until
from benchmarks.harness.published import open_model, publish
from benchmarks.harness.results import RESULTS, write
from benchmarks.harness.store import catalog_ready
from benchmarks.workers.scale import contents_of
from shared_store.base.status import Status
from shared_store.runtime.options import ServeOptions

LOCAL = "127.0.0.1"
PROBE_BLOBS = 300
PROBES = 50
"""Models of the client that measures: each round publishes, attaches to and removes as many."""
FIRST_PROBE = 1 << 20
ROUNDS = 5
RESTARTS = 3
PROCESSES = 4
WAIT_S = 600.0
SETTLE_S = 0.3
"""Seconds after a round until its consequences are over."""
QUIET_S = 12.0
"""Seconds without another compaction after which an idle store is done."""


@dataclass(frozen=True)
class Point:
    """Numbers of a store: its models, the blobs of each, and its connected clients."""

    models: int
    blobs: int
    clients: int


POINTS = {
    "tenth": Point(100, 300, 100),
    "models": Point(1000, 30, 100),
    "blobs": Point(100, 3000, 100),
    "clients": Point(100, 300, 1000),
    "half": Point(500, 300, 500),
    "full": Point(1000, 300, 1000),
}


@dataclass
class Samples:
    """Durations of an operation in milliseconds, and the store's CPU milliseconds for one, by round."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the medians."""
        return {"ms": round(statistics.median(self.ms), 3), "cpu_ms": round(statistics.median(self.cpu_ms), 3)}


class Measured:
    """A node at a point, its clients, and the session that measures."""

    def __init__(self, node: Node, point: Point) -> None:
        """Start the store, publish all models, and connect all clients."""
        self.node = node
        self.point = point
        options = ServeOptions(node.directory, metrics_address=f"{LOCAL}:0", max_clients=point.clients + 64)
        node.start(options.to_json())
        self.session = node.session("measuring")
        catalog_ready(self.session)
        self.publish_seconds = self._publish()
        self.attach_seconds = seconds(self._attach)
        self.operations: dict[str, Samples] = {}

    def _publish(self) -> float:
        half = self.point.models // 2
        shares = ((0, half), (half, self.point.models - half))
        began = time.perf_counter()
        children = [
            self.node.launch(
                f"publisher {first}", "publisher", {"first": first, "models": models, "blobs": self.point.blobs}
            )
            for first, models in shares
        ]
        for child in children:
            child.wait("published", WAIT_S)
        end_all(children)
        return time.perf_counter() - began

    def _attach(self) -> None:
        share, rest = divmod(self.point.clients, PROCESSES)
        self.readers = []
        for number in range(PROCESSES):
            job = {"first": number * share, "clients": share + (rest if number == PROCESSES - 1 else 0)}
            self.readers.append(self.node.launch(f"readers {number}", "readers", {**job, "models": self.point.models}))
        for child in self.readers:
            child.wait("attached", WAIT_S)

    @property
    def store_pid(self) -> int:
        """The store's process id."""
        return self.session.store_pid

    @contextmanager
    def batch(self, name: str, count: int) -> Iterator[list[float]]:
        """Measure a round of an operation; the block appends the duration of each in seconds."""
        samples = self.operations.setdefault(name, Samples())
        took: list[float] = []
        before = cpu_seconds(self.store_pid)
        yield took
        time.sleep(SETTLE_S)
        samples.cpu_ms.append((cpu_seconds(self.store_pid) - before) / count * 1e3)
        samples.ms += [one * 1e3 for one in took]

    def repeat(self, name: str, count: int, operation: Callable[[int], object]) -> None:
        """Measure a round of ``count`` operations, which get their numbers."""
        with self.batch(name, count) as took:
            for number in range(count):
                took.append(seconds(lambda: operation(number)))  # noqa: B023 - called at once

    def close(self) -> None:
        """Disconnect the session that measures."""
        self.session.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, of all its threads, in nanosecond resolution."""
    # The clock of another process, as clock_getcpuclockid(3) makes its id.
    return time.clock_gettime((~pid << 3) | 2)


def scrape(port: int) -> bytes:
    """Return the text of the store's metrics."""
    connection = http.client.HTTPConnection(LOCAL, port, timeout=60)
    with closing(connection):
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


def measure_requests(measured: Measured) -> dict[str, Any]:
    """Return the figures of all operations."""
    device, session, node = Device(), measured.session, measured.node
    port = int(re.findall(r"health at http://127\.0\.0\.1:(\d+)", (node.directory / "store.log").read_text())[-1])
    for round_ in range(ROUNDS):
        first = FIRST_PROBE + round_ * PROBES
        contents = [contents_of(first + number, PROBE_BLOBS) for number in range(PROBES)]
        blobs = [[blob(data) for data in model] for model in contents]

        def publish_one(number: int) -> None:
            open_model(session, key(first + number))  # noqa: B023 - called at once
            publish(session, device, key(first + number), contents[number], blobs[number])  # noqa: B023

        def attach_one(number: int) -> None:
            _, fds = open_model(session, key(first + number), publish=False) or (None, None)  # noqa: B023
            assert fds is not None
            fds.close()

        def connect_one(number: int) -> None:
            with node.session("passing") as passing:
                found = open_model(passing, key(first + number), publish=False)  # noqa: B023
                assert found is not None
                found[1].close()

        def leave_one(number: int) -> None:
            session.leave(key(first + number))  # noqa: B023

        def remove_one(number: int) -> None:
            session.remove(key(first + number))  # noqa: B023

        measured.repeat("publish", PROBES, publish_one)
        for number in range(PROBES):
            leave_one(number)
        measured.repeat("attach", PROBES, attach_one)
        measured.repeat("leave", PROBES, leave_one)
        measured.repeat("connection", PROBES, connect_one)
        measured.repeat("remove", PROBES, remove_one)
        measured.repeat("status", PROBES, lambda _: session.status())
        measured.repeat("scrape", 5, lambda _: scrape(port))
    return {name: samples.figures() for name, samples in measured.operations.items()}


def measure_restart(measured: Measured, longest: dict[str, Any]) -> dict[str, float]:
    """Kill the store several times; return the medians, and add the longest callbacks of each new store."""
    times: dict[str, list[float]] = {}
    models = set(range(min(measured.point.models, measured.point.clients)))

    def whole(status: Status) -> bool:
        read = [model for model in status.models if model.readers]
        return (
            len(status.models) == measured.point.models
            and len(read) == len(models)
            and (sum(model.readers for model in read) == measured.point.clients)
        )

    for _ in range(RESTARTS):
        pid = measured.store_pid
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        with measured.node.session("new", timeout_s=WAIT_S) as session:
            times.setdefault("serving_s", []).append(time.perf_counter() - killed)
            times.setdefault("serving_cpu_s", []).append(cpu_seconds(session.store_pid))
            wait_until(lambda: whole(session.status()), "all clients to rejoin", WAIT_S, 0.2)
            times.setdefault("rejoined_s", []).append(time.perf_counter() - killed)
            times.setdefault("rejoined_cpu_s", []).append(cpu_seconds(session.store_pid))
            catalog_ready(session)
            add_longest(longest, session.status())
        measured.session.status()  # reconnects
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def measure_idle(measured: Measured) -> dict[str, Any]:
    """End all clients at the same moment, and wait until the store has compacted what is left."""
    for child in measured.readers:
        child.kill()
    seen, changed = -1, time.monotonic()
    while time.monotonic() < changed + QUIET_S:
        status = measured.session.status()
        if status.counters.compactions != seen:
            seen, changed = status.counters.compactions, time.monotonic()
        time.sleep(0.25)
    status = measured.session.status()
    longest: dict[str, Any] = {}
    add_longest(longest, status)
    return {"compactions": seen, "resident_bytes": status.totals.resident_bytes, **longest}


def add_longest(longest: dict[str, Any], status: Status) -> None:
    """Add the longest pauses of a store to those of others."""
    loop = status.loop
    assert loop is not None
    found = {
        "callback_ms": loop.callbacks.longest_s * 1e3,
        "cpu_ms": loop.longest_cpu_s * 1e3,
        "collection_ms": loop.collections.longest_s * 1e3,
    }
    for name, value in found.items():
        longest[name] = round(max(longest.get(name, 0.0), value), 2)
    longest["above_50_ms"] = longest.get("above_50_ms", 0) + sum(loop.callbacks.classes[-4:])
    longest["names"] = sorted({*longest.get("names", ()), loop.longest_callback})


def measure(point: Point) -> dict[str, Any]:
    """Return all figures of a point."""
    with Node("scale-worker") as node:
        measured = Measured(node, point)
        try:
            requests = measure_requests(measured)
            busy: dict[str, Any] = {}
            add_longest(busy, measured.session.status())
            usage = node.usage()
            restarted: dict[str, Any] = {}
            restart = measure_restart(measured, restarted)
            idle = measure_idle(measured)
        finally:
            measured.close()
    return {
        "models": point.models,
        "blobs": point.models * point.blobs,
        "clients": point.clients,
        "publish_all_s": round(measured.publish_seconds, 2),
        "attach_all_s": round(measured.attach_seconds, 2),
        "rss_bytes": usage.rss,
        "requests": requests,
        "restart": restart,
        "loop": {"busy": busy, "restarted": restarted, "idle": idle},
    }


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__)
    options.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS), help="which (default all)")
    options.add_argument("--divide", type=int, default=1, help="divide all numbers by this, to try it out (default 1)")
    options.add_argument(
        "--out", type=Path, default=RESULTS / "scale.json", help="result file (default benchmarks/results/scale.json)"
    )
    arguments = options.parse_args()
    result: dict[str, Any] = {
        "versions": {**stamp(), **host(), **wooly(), "load_average": load_average()},
        "points": {},
    }
    for name in arguments.points:
        point = POINTS[name]
        divided = Point(point.models // arguments.divide, point.blobs, point.clients // arguments.divide)
        result["points"][name] = measure(divided)
        print(name, json.dumps(result["points"][name]), flush=True)
        write(arguments.out, result)
