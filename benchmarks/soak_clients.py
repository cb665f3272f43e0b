"""One process of the soak: many clients at once that publish, read, and die at random, until a deadline or a SIGKILL.

    python benchmarks/soak_clients.py RUNTIME_DIR SEED CLIENTS SECONDS

A client is a thread with a connection of its own. At every step of a life it may drop the connection, at times in the
middle of a message. The choices follow from SEED; how they interleave does not. At the end it prints counts as JSON;
anything that no fault of its own explains is in ``unexpected``, and the exit code is 1.
"""

from __future__ import annotations

import ctypes
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from store_node import blob, close_all, content, fill, key, manifest, mapped, open_model

from shared_store.base.digest import digest_at
from shared_store.base.errors import (
    DigestMismatchError,
    ModelInUseError,
    ModelNotFoundError,
    TimedOutError,
    WoolyError,
)
from shared_store.base.manifest import decode
from shared_store.client.session import Session
from shared_store.memory import Access
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds

MODELS = 24
LEASES = 4
BLOB_SIZES = (100, 4096, 70_000, 300_000)
POOL = 40  # distinct blobs that models are made of, so that they share many
DEATH_AT_A_STEP = 0.04
WAIT_S = 5.0


def parts_of(model: int) -> list[tuple[int, int]]:
    """The blobs of a model, by number and size: the same whoever publishes it."""
    chosen = random.Random(model).sample(range(POOL), 6)
    return [(number, BLOB_SIZES[number % len(BLOB_SIZES)]) for number in chosen]


class Died(Exception):  # noqa: N818 - what happened, not a fault
    """This life ends here, without a word to the store."""


class Life:
    """One client, from its connection to its end."""

    def __init__(self, directory: Path, chance: random.Random, count: Callable[[str], None]) -> None:
        self._directory = directory
        self._chance = chance
        self._count = count

    def live(self) -> None:
        """Do a few things, and end somehow."""
        if self._chance.random() < 0.15:
            self._misbehave()
            return
        try:
            with Session.connect(self._directory, name="soak", autostart=False, timeout_s=30.0) as session:
                for _ in range(self._chance.randint(1, 5)):
                    self._step(session)
                    self._do_something(session)
        except Died:
            self._count("died")
        except TimedOutError:
            self._count("gave_up_waiting")
        else:
            self._count("left")

    def _step(self, session: Session) -> None:
        if self._chance.random() < DEATH_AT_A_STEP:
            session.close()  # what it holds ends with the connection, not by a message
            raise Died

    def _do_something(self, session: Session) -> None:
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
        blobs = [blob(*part) for part in parts]
        self._step(session)
        planned, fds = session.plan(key(model), blobs)
        close_all(fds)
        self._step(session)
        if self._chance.random() < 0.1:
            session.abandon(key(model), "by chance")
            self._count("abandoned")
            return
        new = [index for index, place in enumerate(planned.places) if place.new]
        lie = self._chance.choice(new) if new and self._chance.random() < 0.1 else None
        written = [
            (number + 1, nbytes) if index == lie else (number, nbytes) for index, (number, nbytes) in enumerate(parts)
        ]
        fill(session, key(model), planned, written)
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
        """Map it, and check one blob; write into another, which must reach nobody."""
        with mapped(attached.segments, fds, Access.READ) as mappings:
            self._step(session)
            blobs = decode(attached.manifest).blobs
            checked, scribbled = self._chance.sample(range(len(blobs)), 2)
            at = attached.places[checked]
            if digest_at(mappings[at.segment].address + at.offset, blobs[checked].nbytes) != blobs[checked].digest:
                raise AssertionError(f"wrong bytes of blob {checked}")
            at = attached.places[scribbled]
            ctypes.memset(mappings[at.segment].address + at.offset, 0xAA, min(100, blobs[scribbled].nbytes))
            self._count("read")
            time.sleep(self._chance.random() * 0.1)  # a life, not a wait for anything

    def _misbehave(self) -> None:
        """Half a message, garbage, a flood, or silence; and gone."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(30.0)
            sock.connect(str(self._directory / "store.sock"))
            hello = messages.encode(messages.Hello(messages.VERSION, "soak", "0"))
            request = messages.encode(
                messages.Open(1, key(self._chance.randrange(MODELS)), "", "", "cpu", publish=True)
            )
            say = {
                "half_hello": wire.header(hello, 0) + hello[:5],
                "garbage": self._chance.randbytes(200),
                "half_request": wire.header(hello, 0) + hello + wire.header(request, 0) + request[:-3],
                "granted_and_gone": wire.header(hello, 0) + hello + wire.header(request, 0) + request,
                "flood": wire.header(hello, 0) + hello + 200 * (wire.header(request, 0) + request),
                "silence": b"",
            }
            what = self._chance.choice(sorted(say))
            try:
                sock.sendall(say[what])
                if self._chance.random() < 0.5:
                    sock.recv(100)  # long enough for the store to act on it
            except (ConnectionError, TimeoutError):
                pass  # cut off by the store, or nothing came
            self._count(what)


def main() -> int:
    """Run until the deadline; print counts."""
    directory, seed, clients, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    deadline = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    unexpected: list[str] = []
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def run(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        while time.monotonic() < deadline and not unexpected:
            try:
                Life(directory, chance, count).live()
            except (WoolyError, OSError, AssertionError) as error:
                with lock:
                    unexpected.append(f"{type(error).__name__}: {error}")

    for number in range(POOL):  # made once, before the clients come
        content(number, BLOB_SIZES[number % len(BLOB_SIZES)])
    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"counts": counts, "unexpected": unexpected}), flush=True)
    return bool(unexpected)


if __name__ == "__main__":
    sys.exit(main())
