"""A process of the soak: many clients that publish, read and die at random, until a deadline or a SIGKILL.

A client is a thread with its own connection. At every step it may drop the connection, sometimes in the middle of a
message. The choices depend on the seed only; their interleaving does not. At the end the process sends counts of
events; errors that no misbehaviour of a client explains are in ``unexpected``.
"""

from __future__ import annotations

import ctypes
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from support.content import blob, content, key

from benchmarks.harness.device import Device
from benchmarks.harness.published import fill, manifest, mapped, open_model, plan
from benchmarks.harness.worker import Talk, play
from shared_store.base import envs
from shared_store.base.digest import digest_at
from shared_store.base.errors import (
    DigestMismatchError,
    ModelInUseError,
    ModelNotFoundError,
    TimedOutError,
    WoolyError,
)
from shared_store.base.manifest import Blob, decode
from shared_store.client.session import Session
from shared_store.memory import Access
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds

MODELS = 24
LEASES = 4
BLOB_SIZES = (100, 4096, 70_000, 300_000)
POOL = 40
"""Number of distinct blobs, of which all models are made, so that they share many."""
DEATH_AT_A_STEP = 0.04
WAIT_S = 5.0


@cache
def content_of(number: int) -> bytes:
    """Return the bytes of a blob of the pool."""
    return content(number, BLOB_SIZES[number % len(BLOB_SIZES)])


@cache
def blob_of(number: int) -> Blob:
    """Return the manifest entry of a blob of the pool."""
    return blob(content_of(number))


def parts_of(model: int) -> list[int]:
    """Return the numbers of a model's blobs, the same for every publisher."""
    return random.Random(model).sample(range(POOL), 6)


class Died(Exception):  # noqa: N818 - an event, not an error
    """The client has dropped its connection."""


class Life:
    """A client, from its connection to its end."""

    _device = Device()

    def __init__(self, directory: Path, chance: random.Random, count: Callable[[str], None]) -> None:
        self._directory = directory
        self._chance = chance
        self._count = count

    def live(self) -> None:
        """Connect, do a few random things, and leave or die."""
        if self._chance.random() < 0.15:
            self._misbehave()
            return
        try:
            with Session.connect(self._directory, name="soak", autostart=False, timeout_s=30.0) as session:
                for _ in range(self._chance.randint(1, 5)):
                    self._step(session)
                    self._act(session)
        except Died:
            self._count("died")
        except TimedOutError:
            self._count("gave_up_waiting")
        else:
            self._count("left")

    def _step(self, session: Session) -> None:
        if self._chance.random() < DEATH_AT_A_STEP:
            session.close()  # without a message: everything that it used is released with the connection
            raise Died

    def _act(self, session: Session) -> None:
        model = self._chance.randrange(MODELS)
        what = self._chance.random()
        if what < 0.8:
            self._use(session, model)
        elif what < 0.9:
            with session.turn(f"lease-{model % LEASES}", WAIT_S):
                self._step(session)
                session.recall_files(())
        else:
            try:
                session.remove(key(model))
                self._count("removed")
            except (ModelInUseError, ModelNotFoundError):
                self._count("not_removed")

    def _use(self, session: Session, model: int) -> None:
        found = open_model(session, key(model), timeout_s=WAIT_S)
        if found is None:
            self._publish(session, model)
        else:
            self._read(session, *found)
        self._step(session)
        if self._chance.random() < 0.5:
            session.report(key(model), 1000)
        session.leave(key(model))

    def _publish(self, session: Session, model: int) -> None:
        parts = parts_of(model)
        blobs = [blob_of(number) for number in parts]
        self._step(session)
        planned = plan(session, key(model), blobs)
        self._step(session)
        if self._chance.random() < 0.1:
            session.abandon(key(model), "by chance")
            self._count("abandoned")
            return
        new = [index for index, place in enumerate(planned.places) if place.new]
        lie = self._chance.choice(new) if new and self._chance.random() < 0.1 else None
        contents = [content_of(number) for number in parts]
        if lie is not None:
            contents[lie] = bytes(len(contents[lie]))
        fill(session, self._device, key(model), planned, contents)
        self._step(session)
        try:
            attached, fds = session.commit(manifest(key(model), blobs))
        except DigestMismatchError:
            if lie is None:
                raise
            self._count("lies_refused")
            return
        self._count("published")
        self._read(session, attached, fds)

    def _read(self, session: Session, attached: messages.Attached, fds: OwnedFds) -> None:
        """Map the model, verify a blob, and write to another one: no other client may see it."""
        with mapped(self._device, attached.segments, fds, Access.READ) as mappings:
            self._step(session)
            blobs = decode(attached.manifest).blobs
            checked, scribbled = self._chance.sample(range(len(blobs)), 2)
            at = attached.places[checked]
            if digest_at(mappings[at.segment].address + at.offset, blobs[checked].nbytes) != blobs[checked].digest:
                raise AssertionError(f"wrong bytes of blob {checked}")
            at = attached.places[scribbled]
            ctypes.memset(mappings[at.segment].address + at.offset, 0xAA, min(100, blobs[scribbled].nbytes))
            self._count("read")
            time.sleep(self._chance.random() * 0.1)  # read for a while; not a wait for an event

    def _misbehave(self) -> None:
        """Send half a message, garbage, a flood, or nothing; then disconnect."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(30.0)
            sock.connect(str(self._directory / "store.sock"))
            hello = messages.encode(messages.Hello(messages.VERSION, "soak", "0"))
            request = messages.encode(
                messages.Open(1, key(self._chance.randrange(MODELS)), "", "", "cpu", publish=True)
            )
            messages_sent = {
                "half_hello": wire.header(hello, 0) + hello[:5],
                "garbage": self._chance.randbytes(200),
                "half_request": wire.header(hello, 0) + hello + wire.header(request, 0) + request[:-3],
                "granted_and_gone": wire.header(hello, 0) + hello + wire.header(request, 0) + request,
                "flood": wire.header(hello, 0) + hello + 200 * (wire.header(request, 0) + request),
                "silence": b"",
            }
            what = self._chance.choice(sorted(messages_sent))
            try:
                sock.sendall(messages_sent[what])
                if self._chance.random() < 0.5:
                    sock.recv(100)  # wait until the store has handled it
            except (ConnectionError, TimeoutError):
                pass  # the store closed the connection, or sent nothing
            self._count(what)


def clients(talk: Talk, job: dict[str, Any]) -> None:
    """Live lives in ``clients`` threads for ``seconds``, with choices from ``seed``; then send ``counts``."""
    directory, deadline = envs.RUNTIME_DIR.get(), time.monotonic() + job["seconds"]
    counts: Counter[str] = Counter()
    unexpected: list[str] = []
    lock = threading.Lock()

    def count(event: str) -> None:
        with lock:
            counts[event] += 1

    def run(number: int) -> None:
        chance = random.Random(f"{job['seed']} {number}")
        while time.monotonic() < deadline and not unexpected:
            try:
                Life(directory, chance, count).live()
            except (WoolyError, OSError, AssertionError) as error:
                with lock:
                    unexpected.append(f"{type(error).__name__}: {error}")

    for number in range(POOL):  # before the clients start
        blob_of(number)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(job["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    talk.send("counts", counts=counts, unexpected=unexpected)


def main() -> None:
    """Run the role given on the command line."""
    play({"clients": clients})
