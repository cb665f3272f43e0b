"""Requests of the store while a client waits: how fast they are answered, and how fast a cancel frees a place.

    python benchmarks pushes [--rounds 500] [--out FILE]

A store in a thread of this process, and clients at its real socket; no device.

answer_ms    from the request (``SwapOut``) to its answer, by a client whose ``Open`` waits for another's publication in
             another thread: ``p50``, ``p99`` and ``max``.
accepted_ms  the same, to ``Accepted``, which the handler sends before it does anything.
cancel_ms    from a ``Cancel`` of an ``Open`` that waits to its answer, which the store sends once the place is free.
status_ms    a ``GetStatus`` of that client while its ``Open`` waits.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from support.content import key
from support.rawclient import RawClient
from support.served import ServedStore
from support.waiting import wait_until

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import percentile
from benchmarks.harness.machine import host, load_average, stamp, wooly
from benchmarks.harness.results import RESULTS, write
from shared_store.client.session import Session
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages


def open_model(session: Session, timeout_s: float) -> None:
    """Open the model of all rounds."""
    session.open(key(1), name="", engine="", device="cpu", publish=True, timeout_s=timeout_s)


def spread(seconds: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    ordered = sorted(seconds)
    figures = {"p50": percentile(ordered, 50), "p99": percentile(ordered, 99), "max": ordered[-1]}
    return {name: round(value * 1e3, 3) for name, value in figures.items()}


def ask(served: ServedStore, session: Session, rounds: int) -> dict[str, Any]:
    """Time requests of the store to a client whose ``Open`` waits."""
    peer = served.call(lambda: served.parts.sessions.of(session.client))
    answered, accepted = [], []

    async def one_round() -> None:
        heard: list[float] = []
        began = time.perf_counter()
        await peer.ask(messages.SwapOut(0, "a round"), within_s=10, heard=lambda _: heard.append(time.perf_counter()))
        answered.append(time.perf_counter() - began)
        accepted.append(heard[0] - began)

    for _ in range(rounds):
        served.run(one_round())
    return {"answer_ms": spread(answered), "accepted_ms": spread(accepted)}


def cancel(served: ServedStore, rounds: int) -> dict[str, Any]:
    """Time cancels of an ``Open`` that waits."""
    took = []
    with RawClient(served.paths.socket) as client:
        for number in range(1, rounds + 1):
            client.send(messages.Open(number, key(1), "", "", "cpu", publish=True))
            wait_until(lambda: len(served.call(served.parts.waiters.all)) > 1, "the wait")
            began = time.perf_counter()
            client.send(messages.Cancel(number))
            answer = client.receive()
            took.append(time.perf_counter() - began)
            assert (answer.id, answer.code) == (number, "cancelled")
            assert len(served.call(served.parts.waiters.all)) == 1
    return {"cancel_ms": spread(took)}


def status(session: Session, rounds: int) -> dict[str, Any]:
    """Ask for the status while an ``Open`` waits."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        session.status()
        took.append(time.perf_counter() - began)
    return {"status_ms": spread(took)}


def measure(rounds: int) -> dict[str, Any]:
    """Return all figures."""
    with (
        tempfile.TemporaryDirectory(prefix="wooly-") as directory,
        ServedStore(directory, FakeBackend("cpu")) as served,
        Session.connect(served.paths.directory, name="publisher", autostart=False) as publisher,
        Session.connect(served.paths.directory, name="workload", autostart=False) as session,
    ):
        open_model(publisher, 10.0)
        session.serve(messages.SwapOut, lambda _, call: call.accept())
        waiter = threading.Thread(target=open_model, args=(session, 600.0))
        waiter.start()
        wait_until(lambda: served.call(served.parts.waiters.all), "the wait")
        figures = {
            **ask(served, session, rounds),
            **status(session, rounds),
            **cancel(served, rounds),
        }
        publisher.abandon(key(1), "the end")
        waiter.join()
    return {"versions": {**stamp(), **host(), **wooly(), "load_average": load_average()}, "rounds": rounds, **figures}


def main() -> None:
    """Run the command line; write the result file."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=500)
    arguments.add_argument("--out", type=Path, default=RESULTS / "pushes.json")
    options = arguments.parse_args()
    result = measure(options.rounds)
    print(json.dumps(result, indent=1))
    write(options.out, result)
