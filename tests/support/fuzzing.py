"""A fuzzer of the store's protocol: damaged conversations, with fds, through decoder, dispatch and handlers.

An execution is one connection over a socket pair: a plausible conversation (publish, read, rejoin and offer with its
ticket, turns, compaction, cancels, answers), in which messages are dropped, repeated, swapped and changed in their
fields, and frames in their bytes, lengths, counts and fds. All executions meet one store, which must answer or end each
connection, log no internal error, and afterwards have no client, no wait and no descriptor of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections import Counter
from dataclasses import dataclass, field

import msgspec
from support.content import blob, key, manifest_of
from support.waiting import open_fds, readable

from shared_store.base.checkpoint import FileId
from shared_store.base.errors import WoolyError
from shared_store.base.manifest import encode as encode_manifest
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages, wire
from shared_store.protocol.peers import peer_of
from shared_store.store.assembly import Parts
from shared_store.store.connection import Connection
from shared_store.store.exchange import Exchange
from shared_store.store.session import Session
from shared_store.store.state.clients import Client

DATA = bytes(3000)
"""Content of the only blob: that of fresh memory, so that a publisher need not write it."""
BLOB = blob(DATA)
MANIFESTS = {number: encode_manifest(manifest_of(key(number), [BLOB])) for number in (1, 2)}
INTERESTING = (
    0,
    1,
    -1,
    2,
    255,
    2**16,
    2**31,
    2**63 - 1,
    -(2**63),
    "",
    "x",
    key(1),
    key(2),
    b"",
    b"\0" * 32,
    None,
    True,
)
CAPACITY = 64 << 20


@dataclass
class Outcome:
    """What a run found.

    `answers`: replies by their type, errors by their code; `ends`: how connections ended; `crashes`: internal errors;
    `leaks`: descriptors left over.
    """

    executions: int = 0
    frames: int = 0
    fds: int = 0
    answers: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    leaks: int = 0


def conversation(rng):
    """Return a plausible list of (message as a dict, number of fds)."""
    usual = rng.choice((1, 2))

    def key_of():
        return key(usual if rng.random() < 0.92 else 3 - usual)

    place = messages.BlobPlace(0, 0)
    info = messages.SegmentInfo(rng.choice((1, 2, 77)), 2 << 20)
    publish = [
        messages.Open(0, key_of(), "n", "e", "cpu", rng.random() < 0.8),
        messages.Plan(0, key_of(), (BLOB,)),
        messages.Fill(0, key_of(), rng.choice((1, 2, 3))),
        messages.Commit(0, key_of(), MANIFESTS[usual]),
        messages.Report(0, key_of(), 7),
        messages.Leave(0, key_of()),
    ]
    offer = [
        messages.Rejoin(0, key_of(), (info.id,)),
        messages.Offer(0, key_of(), MANIFESTS[usual], (place,), (info,), 0, rng.choice((1, 1, 1, 2))),
    ]
    others = [
        messages.Acquire(0, "turn", rng.random() < 0.7),
        messages.Yield(0, "turn"),
        messages.RecallFiles(0, (FileId(1, 2, 3, 4, 5),)),
        messages.RememberFiles(0, ((FileId(1, 2, 3, 4, 5), b"d" * 32),)),
        messages.Compact(0, "cpu"),
        messages.Compacted(0, 1),
        messages.AbandonCompaction(0, 1),
        messages.Remove(0, key_of()),
        messages.Pin(0, key_of(), pinned=rng.random() < 0.5),
        messages.Quarantine(0, key_of(), (BLOB.digest,)),
        messages.Abandon(0, key_of(), "r"),
        messages.ReportFallback(0, "n", "r"),
        messages.GetStatus(0),
        messages.Unsupported(1),
        messages.Accepted(1),
        messages.Progress(1, 1),
        messages.Failed(1, "declined", "r"),
    ]
    chosen = rng.choice((publish, publish[: rng.randint(1, 6)], offer, offer * 2, publish + offer))
    chosen = chosen + rng.sample(others, rng.randint(0, 4))
    listed = []
    for number, message in enumerate(chosen, 1):
        if isinstance(message, messages.Request):
            message = msgspec.structs.replace(message, id=number)  # noqa: PLW2901
        listed.append((msgspec.to_builtins(message, builtin_types=(bytes,)), isinstance(message, messages.Offer)))
        if rng.random() < 0.15:
            listed.append(({"type": "cancel", "id": rng.randint(1, number)}, 0))
    return [(message, int(fds)) for message, fds in listed]


def damage(rng, listed):
    """Drop, repeat, swap and change messages."""
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))):
        if not listed:
            return listed
        at = rng.randrange(len(listed))
        message, fds = listed[at]
        match rng.randrange(6):
            case 0:
                listed.pop(at)
            case 1:
                listed.insert(at, (dict(message), fds))
            case 2:
                other = rng.randrange(len(listed))
                listed[at], listed[other] = listed[other], listed[at]
            case 3:
                listed[at] = ({**message, rng.choice([*message, "id"]): rng.choice(INTERESTING)}, fds)
            case 4:
                listed[at] = ({name: value for name, value in message.items() if rng.random() < 0.8}, fds)
            case _:
                listed[at] = (message, rng.choice((0, 1, 2, 5)))
    return listed


def frame(rng, payload, fds):
    """Return the bytes of a frame, perhaps damaged."""
    count = fds
    if rng.random() < 0.06:
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        payload = bytes(damaged)
    if rng.random() < 0.02:
        count = rng.choice((0, 1, 3, 4096, 65535))
    data = wire.header(payload, count) + payload
    return data[: rng.randrange(1, len(data))] if rng.random() < 0.02 else data


async def send(rng, sock, listed, outcome, segments):
    """Send the frames, some of them damaged. Returns after the last, or when the store has closed the connection.

    `segments()`: ids that the store has promised by now, for messages that name one.
    """
    for message, fds in listed:
        if rng.random() < 0.9:  # else it arrives with the one before
            await pause(rng.choice((2, 10, 10, 40)))
        if "segment" in message and rng.random() < 0.9 and (promised := segments()):
            message = {**message, "segment": rng.choice(promised)}  # noqa: PLW2901
        data = frame(rng, msgspec.msgpack.encode(message), fds)
        given = [rng.choice((offered_fd(), offered_fd(), 0)) for _ in range(fds)]
        outcome.frames += 1
        outcome.fds += fds
        try:
            cut = rng.randint(1, len(data)) if rng.random() < 0.3 else len(data)
            sock.sendmsg([data[:cut]], wire._ancillary(given))
            if data[cut:]:
                sock.sendall(data[cut:])
        except OSError:
            return


async def pause(turns):
    """Let the store's event loop run; work in threads may end meanwhile."""
    for _ in range(turns):
        await asyncio.sleep(0)


def offered_fd():
    """A descriptor of a sealed segment that matches the offered model, made once."""
    if not _SEGMENT:
        import fcntl

        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, DATA)
        os.ftruncate(fd, 2 << 20)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x000F)
        _SEGMENT.append(fd)
    return _SEGMENT[0]


_SEGMENT: list[int] = []


class _Errors(logging.Handler):
    """Collects internal errors."""

    def __init__(self, outcome):
        super().__init__(logging.ERROR)
        self.outcome = outcome

    def emit(self, record):
        if record.exc_info:
            self.outcome.crashes.append(self.format(record))


class Fuzzer:
    """Runs executions against one store. Call `run` in an event loop."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.outcome = Outcome()
        self.parts = Parts({"cpu": FakeBackend("cpu", CAPACITY)}, {"cpu": CAPACITY})
        self.dispatch = self.parts.dispatch(self._status, asyncio.Event())
        self.numbers = iter(range(1, 1 << 60))

    def _status(self):
        raise WoolyError("no status here")

    async def run(self, executions):
        """Run conversations one after another."""
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.outcome.crashes.append(str(context.get("exception") or context["message"]))
        )
        handler = _Errors(self.outcome)
        root = logging.getLogger("shared_store")
        root.addHandler(handler)
        disabled, root.propagate = root.propagate, False
        offered_fd()
        await self._execute()  # whatever is opened once
        self.outcome = handler.outcome = Outcome()
        before = self._left()
        try:
            for _ in range(executions):
                await self._execute()
                self.outcome.executions += 1
                if self.outcome.executions % 100 == 0:
                    self._tidy()
            self._tidy()
        finally:
            root.removeHandler(handler)
            root.propagate = disabled
        self.outcome.leaks = self._left() - before
        return self.outcome

    async def _execute(self):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        connection = Connection(theirs, peer_of(theirs), next(self.numbers))
        connection.start()
        connection.greeted()
        session = Session(
            Client(connection.number, os.getpid(), os.getuid(), "fuzz"), connection.closed, lambda *_: None
        )
        exchange = Exchange(connection, session, self.dispatch, protocol=self.rng.choice((1, 2, 2, 2)))
        self.parts.sessions.begin(exchange.session)
        exchange.begin()
        asked = asyncio.ensure_future(self._ask(exchange.session))
        await send(self.rng, ours, damage(self.rng, conversation(self.rng)), self.outcome, self._segments)
        if self.rng.random() < 0.8:  # else it disconnects while its requests run
            for _ in range(50):
                if all(one.pending._stop for one in exchange._running):
                    break
                await asyncio.sleep(0.0005)
        await pause(2)
        self._read(ours)
        ours.close()
        await asyncio.wait_for(connection.closed.wait(), 20)
        await asyncio.wait_for(exchange.ended(), 60)
        await asked
        connection._shut()
        self.parts.sessions.end(exchange.session)
        words = "".join(" " if one.isdigit() else one for one in connection.reason.partition(":")[0])
        self.outcome.ends[" ".join(words.split())[:60]] += 1
        assert connection.number not in self.parts.state.clients
        assert self.parts.waiters.all() == []

    async def _ask(self, session):
        with contextlib.suppress(WoolyError):
            await session.ask(messages.SwapOut(0, "fuzz"), within_s=20)

    def _read(self, sock):
        """Read all answers, and count them."""
        decoder = wire.Decoder(wire.MAX_FROM_STORE)
        while readable(sock, 0):
            try:
                data, fds = wire.receive(sock)
            except OSError:
                return
            if not data:
                fds.close()
                return
            for frame in decoder.feed(data, fds):
                frame.fds.close()
                message = messages.decode_from_store(frame.payload)
                name = message.code if isinstance(message, messages.Failed) else type(message).__name__
                self.outcome.answers[name] += 1

    def _segments(self):
        state = self.parts.state
        compactions = [one.segment for number in state.clients for one in state.compactions.by(number)]
        return [segment for plan in state.plans.values() for segment in plan.segments] + compactions

    def _tidy(self):
        """Remove all models, so that conversations begin with an empty store again and again."""
        for model in self.parts.state.models.all():
            self.parts.effects.carry_out(self.parts.state.remove(model.key)[1])

    def _left(self):
        self._tidy()
        return open_fds()


def fuzz(executions, seed):
    """Run a number of executions; return what they found."""

    async def run():
        fuzzer = Fuzzer(seed)
        try:
            return await fuzzer.run(executions)
        finally:
            fuzzer.parts.devices.close()

    try:
        return asyncio.run(run())
    finally:
        while _SEGMENT:
            os.close(_SEGMENT.pop())
