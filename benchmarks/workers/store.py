"""Clients that attach to random models until a deadline, for the benchmark ``store``."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from support.content import key

from benchmarks.harness.device import Device
from benchmarks.harness.published import mapped, open_model
from benchmarks.harness.worker import Talk, play
from shared_store.client.session import Session
from shared_store.memory import Access


def clients(talk: Talk, job: dict[str, Any]) -> None:
    """Connect, send ``connected``, wait for a word, attach for ``seconds``, send ``latencies`` (seconds).

    ``job``: ``number`` (of this process, seeds its choices), ``clients`` (threads), ``models``, ``seconds``.
    """
    number, device = job["number"], Device()
    sessions = [
        Session.connect(name=f"client {number}", autostart=False, timeout_s=30.0) for _ in range(job["clients"])
    ]
    found: list[list[float]] = [[] for _ in sessions]
    talk.send("connected")
    next(talk.words(), "")
    deadline = time.perf_counter() + job["seconds"]

    def run(index: int) -> None:
        chance = random.Random(f"{number} {index}")
        session = sessions[index]
        while time.perf_counter() < deadline:
            model = key(chance.randrange(job["models"]))
            began = time.perf_counter()
            attached = open_model(session, model)
            assert attached is not None
            reply, fds = attached
            with mapped(device, reply.segments, fds, Access.READ):
                found[index].append(time.perf_counter() - began)
            session.leave(model)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    talk.send("latencies", latencies=[latency for one in found for latency in one])


def main() -> None:
    """Run the role given on the command line."""
    play({"clients": clients})
