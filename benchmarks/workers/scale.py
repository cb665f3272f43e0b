"""Publishers and connected readers of many small models, for the benchmark ``scale``."""

from __future__ import annotations

from typing import Any

from support.content import blob, content, key

from benchmarks.harness.device import Device
from benchmarks.harness.published import open_model, publish
from benchmarks.harness.worker import Talk, play
from shared_store.client.session import Session
from shared_store.runtime.fds import raise_file_limit

BLOB_BYTES = 512
"""Bytes of each blob. The store's work depends on numbers, not on bytes."""


def contents_of(model: int, blobs: int) -> list[bytes]:
    """Return the bytes of a model's blobs, which no other model has."""
    return [content(f"{model} {number}", BLOB_BYTES) for number in range(blobs)]


def publisher(talk: Talk, job: dict[str, Any]) -> None:
    """Publish models and leave them, then send ``published``.

    ``job``: ``first`` model, number of ``models``, and ``blobs`` of each.
    """
    device = Device()
    with Session.connect(name="publisher", autostart=False, timeout_s=60.0) as session:
        for model in range(job["first"], job["first"] + job["models"]):
            contents = contents_of(model, job["blobs"])
            if open_model(session, key(model)) is None:
                publish(session, device, key(model), contents, [blob(data) for data in contents])
            session.leave(key(model))
    talk.send("published")


def readers(talk: Talk, job: dict[str, Any]) -> None:
    """Connect clients, attach each to a model, send ``attached``, and stay connected until the end of input.

    ``job``: ``first`` (number of the first client), ``clients``, ``models``: a client reads the model of its number,
    counted round.
    """
    raise_file_limit()
    sessions = []
    for number in range(job["first"], job["first"] + job["clients"]):
        sessions.append(Session.connect(name=f"reader {number}", autostart=False, timeout_s=60.0))
        attached = open_model(sessions[-1], key(number % job["models"]), publish=False)
        assert attached is not None
        attached[1].close()
    talk.send("attached")
    for _ in talk.words():
        pass


def main() -> None:
    """Run the role given on the command line."""
    play({"publisher": publisher, "readers": readers})
