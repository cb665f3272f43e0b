"""A process of the soak: many clients that publish, read and die at random, until a deadline or a SIGKILL.

A client is a thread with its own connection. At every step it may drop the connection, sometimes in the middle of a
message. With protocol 2 it also has several requests at once, stops to wait for some, and answers the store's. The
choices depend on the seed only; their interleaving does not. At the end the process sends counts of events; errors that
no misbehaviour of a client explains are in ``unexpected``.

This module also runs on the wooly of protocol 1, see ``soak/command.py``: it uses names of later versions only where
the store speaks protocol 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
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
    ConnectionLostError,
    DigestMismatchError,
    ModelInUseError,
    ModelNotFoundError,
    StoreUnavailableError,
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
SOON_S = (0.0, 0.02)
"""Waits that are often too short for another client to publish, or to pass a turn on."""
LOST = (ConnectionLostError, StoreUnavailableError)
"""What a client meets when the store is killed."""


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

    def __init__(
        self, directory: Path, chance: random.Random, count: Callable[[str], None], *, disrupted: bool = False
    ) -> None:
        """``disrupted``: the store may end at any time."""
        self._directory = directory
        self._chance = chance
        self._count = count
        self._lost = LOST if disrupted else ()

    def live(self) -> None:
        """Connect, do a few random things, and leave or die."""
        if self._chance.random() < 0.15:
            self._misbehave()
            return
        try:
            with Session.connect(self._directory, name="soak", autostart=False, timeout_s=30.0) as session:
                both_ways = speaks_both_ways(session)
                if both_ways:
                    session.serve(messages.SwapOut, self._swap_out)
                for _ in range(self._chance.randint(1, 5)):
                    self._step(session)
                    if both_ways and self._chance.random() < 0.3:
                        self._together(session)
                    else:
                        self._act(session)
        except self._lost:
            self._count("lost")
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

    def _together(self, session: Session) -> None:
        """Make several requests at once; a time-out ends the wait for one of them, and nothing else."""
        # A session may wait for a turn only once, so each request is about another turn, too.
        models = [number + LEASES * self._chance.randrange(MODELS // LEASES) for number in range(LEASES)]
        seeds = [self._chance.random() for _ in models]
        errors: list[BaseException] = []

        def run(model: int, seed: float) -> None:
            try:
                self._one_of_several(session, model, random.Random(seed))
            except BaseException as error:  # noqa: BLE001 - raised below, in the client's own thread
                errors.append(error)

        threads = [threading.Thread(target=run, args=one) for one in zip(models, seeds, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        if self._chance.random() < 0.5:
            session.status()  # the session goes on
        self._count("together")

    def _one_of_several(self, session: Session, model: int, chance: random.Random) -> None:
        what = chance.random()
        try:
            if what < 0.5:
                found = open_model(session, key(model), publish=False, timeout_s=chance.uniform(*SOON_S))
                if found is not None:
                    self._read(session, *found, chance=chance)
                    self._leave(session, model)
            elif what < 0.8:
                with session.turn(f"lease-{model % LEASES}", chance.uniform(*SOON_S)):
                    time.sleep(chance.uniform(*SOON_S))
            else:
                session.recall_files(())
        except TimedOutError:
            self._count("cancelled")
        except ModelNotFoundError:
            self._count("not_found")

    def _swap_out(self, request: Any, call: Any) -> str:
        """Answer the store: at once, after a while, or with a reason to stay."""
        from shared_store.base.errors import DeclinedError

        what = random.random()
        if what < 0.3:
            self._count("declined")
            raise DeclinedError("by chance")
        if what < 0.6:
            call.accept()
            call.progress(1, 2)
            call.cancelled.wait(random.uniform(*SOON_S))
        self._count("swapped_out")
        return f"for {request.reason}"

    def _use(self, session: Session, model: int) -> None:
        found = open_model(session, key(model), timeout_s=WAIT_S)
        reads = found is not None or self._publish(session, model)
        if found is not None:
            self._read(session, *found)
        self._step(session)
        if reads and self._chance.random() < 0.5:
            with self._not_rejoined():
                session.report(key(model), 1000)
        self._leave(session, model)

    def _leave(self, session: Session, model: int) -> None:
        with self._not_rejoined():
            session.leave(key(model))

    @contextlib.contextmanager
    def _not_rejoined(self) -> Iterator[None]:
        """A restarted store may have the model in other segments by the time at which this reader rejoins."""
        try:
            yield
        except ModelNotFoundError:
            if not self._lost:
                raise
            self._count("not_rejoined")

    def _publish(self, session: Session, model: int) -> bool:
        """Publish a model, and read it. Return False if the publication was given up or refused."""
        parts = parts_of(model)
        blobs = [blob_of(number) for number in parts]
        self._step(session)
        planned = plan(session, key(model), blobs)
        self._step(session)
        if self._chance.random() < 0.1:
            session.abandon(key(model), "by chance")
            self._count("abandoned")
            return False
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
            return False
        self._count("published")
        self._read(session, attached, fds)
        return True

    def _read(
        self, session: Session, attached: messages.Attached, fds: OwnedFds, *, chance: random.Random | None = None
    ) -> None:
        """Map the model, verify a blob, and write to another one: no other client may see it."""
        chosen = chance or self._chance
        with mapped(self._device, attached.segments, fds, Access.READ) as mappings:
            if chance is None:
                self._step(session)
            blobs = decode(attached.manifest).blobs
            checked, scribbled = chosen.sample(range(len(blobs)), 2)
            at = attached.places[checked]
            if digest_at(mappings[at.segment].address + at.offset, blobs[checked].nbytes) != blobs[checked].digest:
                raise AssertionError(f"wrong bytes of blob {checked}")
            at = attached.places[scribbled]
            ctypes.memset(mappings[at.segment].address + at.offset, 0xAA, min(100, blobs[scribbled].nbytes))
            self._count("read")
            time.sleep(chosen.random() * 0.1)  # read for a while; not a wait for an event

    def _misbehave(self) -> None:
        """Send half a message, garbage, a flood, or nothing; then disconnect."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(30.0)
            try:
                sock.connect(str(self._directory / "store.sock"))
            except OSError:
                if not self._lost:
                    raise
                self._count("lost")
                return
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


def speaks_both_ways(session: Session) -> bool:
    """Return True if session and store speak protocol 2: requests at once, cancels, requests of the store."""
    supports = getattr(session, "supports", None)
    return hasattr(messages, "Cancel") and supports is not None and supports(messages.capabilities.ABANDON_COMPACTION)


def clients(talk: Talk, job: dict[str, Any]) -> None:
    """Live lives in ``clients`` threads for ``seconds``, with choices from ``seed``; then send ``counts``.

    ``pause_s``: mean pause of a client between two lives. ``disrupted``: the store may end at any time.
    """
    pause_s, disrupted = job.get("pause_s", 0.0), job.get("disrupted", False)
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
                Life(directory, chance, count, disrupted=disrupted).live()
                if pause_s:  # spreads the load of a long soak
                    time.sleep(min(chance.expovariate(1 / pause_s), max(0.0, deadline - time.monotonic())))
            except (WoolyError, OSError, AssertionError) as error:
                with lock:
                    calls = [f"{call.name}:{call.lineno}" for call in traceback.extract_tb(error.__traceback__)]
                    unexpected.append(f"{type(error).__name__}: {error} (in {', '.join(calls)})")

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
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(threadName)s %(message)s"
    )  # to the log of the process
    play({"clients": clients})
