"""What a store's requests cost, by the numbers of its models, blobs and connected clients.

    python benchmarks scale [--points NAME ...] [--divide N] [--out FILE]

Each point is a keeper and store of its own, with models whose blobs nobody else has, in host memory, and with clients
that are connected and read one model each. ``tenth`` has 100 models of 300 blobs and 100 clients; ``models``, ``blobs``
and ``clients`` have ten times as many of one of them; ``half`` and ``full`` have 500 and 1,000 models of 300 blobs, and
as many clients. Blobs have 512 bytes: the store's work depends on numbers, not on bytes. All stores exist at the same
time, and rounds of measurements alternate between them, so that the machine's other work has the same part in each. One
more client of each measures, with models of 300 blobs of its own at every point:

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
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
        self.restarts: dict[str, list[float]] = {}
        self.longest: dict[str, dict[str, Any]] = {"busy": {}, "restarted": {}, "idle": {}}
        self.idle: dict[str, int] = {}
        self.rss = 0

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

    def figures(self) -> dict[str, Any]:
        """Return all figures."""
        return {
            "models": self.point.models,
            "blobs": self.point.models * self.point.blobs,
            "clients": self.point.clients,
            "publish_all_s": round(self.publish_seconds, 2),
            "attach_all_s": round(self.attach_seconds, 2),
            "rss_bytes": self.rss,
            "requests": {name: samples.figures() for name, samples in self.operations.items()},
            "restart": {name: round(statistics.median(values), 3) for name, values in self.restarts.items()},
            "loop": {**self.longest, "idle": self.longest["idle"] | self.idle},
        }

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


def measure_round(measured: Measured, number: int) -> None:
    """Measure a round of all operations."""
    device, session, node = Device(), measured.session, measured.node
    port = int(re.findall(r"health at http://127\.0\.0\.1:(\d+)", (node.directory / "store.log").read_text())[-1])
    first = FIRST_PROBE + number * PROBES
    contents = [contents_of(first + probe, PROBE_BLOBS) for probe in range(PROBES)]
    blobs = [[blob(data) for data in model] for model in contents]

    def publish_one(probe: int) -> None:
        open_model(session, key(first + probe))
        publish(session, device, key(first + probe), contents[probe], blobs[probe])

    def attach_one(probe: int) -> None:
        found = open_model(session, key(first + probe), publish=False)
        assert found is not None
        found[1].close()

    def connect_one(probe: int) -> None:
        with node.session("passing") as passing:
            found = open_model(passing, key(first + probe), publish=False)
            assert found is not None
            found[1].close()

    measured.repeat("publish", PROBES, publish_one)
    for probe in range(PROBES):
        session.leave(key(first + probe))
    measured.repeat("attach", PROBES, attach_one)
    measured.repeat("leave", PROBES, lambda probe: session.leave(key(first + probe)))
    measured.repeat("connection", PROBES, connect_one)
    measured.repeat("remove", PROBES, lambda probe: session.remove(key(first + probe)))
    measured.repeat("status", PROBES, lambda _: session.status())
    measured.repeat("scrape", 5, lambda _: scrape(port))


def measure_restart(measured: Measured) -> None:
    """Kill the store, and wait until all clients have rejoined."""
    times = measured.restarts
    models = min(measured.point.models, measured.point.clients)

    def whole(status: Status) -> bool:
        read = [model.readers for model in status.models if model.readers]
        return (len(status.models), len(read), sum(read)) == (measured.point.models, models, measured.point.clients)

    killed = time.perf_counter()
    os.kill(measured.store_pid, signal.SIGKILL)
    with measured.node.session("new", timeout_s=WAIT_S) as session:
        times.setdefault("serving_s", []).append(time.perf_counter() - killed)
        times.setdefault("serving_cpu_s", []).append(cpu_seconds(session.store_pid))
        wait_until(lambda: whole(session.status()), "all clients to rejoin", WAIT_S, 0.2)
        times.setdefault("rejoined_s", []).append(time.perf_counter() - killed)
        times.setdefault("rejoined_cpu_s", []).append(cpu_seconds(session.store_pid))
        catalog_ready(session)
        add_longest(measured.longest["restarted"], session.status())
    measured.session.status()  # reconnects


def measure_idle(measured: Measured) -> None:
    """Wait until the store, whose clients have ended, has compacted what is left."""
    status = measured.session.status()
    seen, changed = status.counters.compactions, time.monotonic()
    while time.monotonic() < changed + QUIET_S:
        status = measured.session.status()
        if status.counters.compactions != seen:
            seen, changed = status.counters.compactions, time.monotonic()
        time.sleep(0.25)
    measured.idle = {"compactions": seen, "resident_bytes": status.totals.resident_bytes}
    add_longest(measured.longest["idle"], status)


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


def measure(points: Mapping[str, Point]) -> dict[str, Any]:
    """Return all figures of the points."""
    with ExitStack() as closing:
        stores: dict[str, Measured] = {}
        for name, point in points.items():
            stores[name] = Measured(closing.enter_context(Node("scale-worker")), point)
            closing.callback(stores[name].close)
            print(f"{name}: published in {stores[name].publish_seconds:.1f} s", flush=True)
        for number in range(ROUNDS):
            for measured in stores.values():
                measure_round(measured, number)
        for measured in stores.values():
            add_longest(measured.longest["busy"], measured.session.status())
            measured.rss = measured.node.usage().rss
        for _ in range(RESTARTS):
            for measured in stores.values():
                measure_restart(measured)
        for measured in stores.values():
            for child in measured.readers:
                child.kill()
        for measured in stores.values():
            measure_idle(measured)
        return {name: measured.figures() for name, measured in stores.items()}


def main() -> None:
    """Measure, and write the results."""
    options = parser(__doc__)
    options.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS), help="which (default all)")
    options.add_argument("--divide", type=int, default=1, help="divide all numbers by this, to try it out (default 1)")
    options.add_argument(
        "--out", type=Path, default=RESULTS / "scale.json", help="result file (default benchmarks/results/scale.json)"
    )
    arguments = options.parse_args()
    points = {
        name: Point(point.models // arguments.divide, point.blobs, point.clients // arguments.divide)
        for name, point in POINTS.items()
        if name in arguments.points
    }
    versions = {**stamp(), **host(), **wooly(), "load_average": load_average()}
    result = {"versions": versions, "points": measure(points)}
    write(arguments.out, result)
    print(json.dumps(result, indent=1))
