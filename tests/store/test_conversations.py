"""Any interleaving of requests, cancels, cut frames, lost peers and late answers, over real sockets of a real store.

Several clients send without waiting for each other. The order in which the store meets their messages is not known, but
what it answered is: after each step each client's own view (what it was granted, returned and still waits for) must be
the store's state, each request has one answer, and in the end nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import shutil
import tempfile
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.content import blob, content, key, manifest_of
from support.rawclient import RawClient
from support.served import ServedStore
from support.waiting import open_fds, readable, wait_until

from shared_store.base.errors import ConnectionLostError, DeclinedError
from shared_store.base.manifest import encode
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages, wire

KEYS = (key(1), key(2))
TURNS = ("one", "two")
WHICH = st.integers(0, 7)
DATA = content(1, 5000)
BLOB = blob(DATA)


@dataclass(eq=False)
class Peer:
    """A client, and its view of what it has. `pending`: its unanswered requests; `asked`: the store's, by id."""

    raw: RawClient
    number: int
    ids: int = 0
    pending: dict[int, messages.Request] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    turns: set[str] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    withdrawn: set[int] = field(default_factory=set)
    answers: dict[int, messages.Reply] = field(default_factory=dict)

    def request(self, make):
        self.ids += 1
        self.pending[self.ids] = make(self.ids)
        self.raw.send(self.pending[self.ids])
        return self.ids

    def cancel(self, number):
        self.cancelled.add(number)
        self.raw.send(messages.Cancel(number))

    def pump(self, timeout_s=0.0):
        """Act on what has arrived. Returns whether anything had."""
        if not self.raw.channel._ready and not readable(self.raw.sock, timeout_s):
            return False
        frame = self.raw.channel.receive()
        with frame.fds:
            message = messages.decode_from_store(frame.payload)
            if isinstance(message, messages.SwapOut):
                self.asked.add(message.id)
            elif isinstance(message, messages.Cancel):
                self.withdrawn.add(message.id)
            elif isinstance(message, messages.Reply):
                if isinstance(message, messages.Filled):
                    with mmap.mmap(frame.fds.filenos()[0], len(DATA)) as memory:
                        memory[:] = DATA
                self._answered(message)
        return True

    def wait_for(self, number):
        """Wait for the answer to a request, and act on others meanwhile."""
        while number in self.pending:
            assert self.pump(10.0), f"no answer to {self.pending[number]}"
        return self.answers[number]

    def _answered(self, reply):
        request = self.pending.pop(reply.id)  # a second answer is a KeyError
        self.answers[reply.id] = reply
        late = reply.id in self.cancelled
        match request, reply:
            case messages.Open(), messages.Granted():
                self.published.add(request.key)
                if late:
                    self.request(lambda n: messages.Abandon(n, request.key, "late"))
            case ((messages.Open() | messages.Commit()), messages.Attached()):
                self.published.discard(request.key)
                self.read.add(request.key)
                if late:
                    self.request(lambda n: messages.Leave(n, request.key))
            case messages.Acquire(), messages.Granted():
                self.turns.add(request.lease)
                if late:
                    self.request(lambda n: messages.Yield(n, request.lease))
            case messages.Leave() | messages.Abandon(), messages.Done():
                self.published.discard(request.key)
                self.read.discard(request.key)
            case messages.Yield(), messages.Done():
                self.turns.discard(request.lease)
            case _, messages.Failed():
                allowed = {"protocol", "cancelled", "model_not_found", "not_publisher", "model_in_use"}
                assert reply.code in allowed, reply
                assert reply.code != "cancelled" or late or self._may_leave(request), reply

    def _may_leave(self, request):
        """Whether the client sent `Leave` or `Yield` for what it waited for."""
        return isinstance(request, messages.Open | messages.Acquire)

    def waits(self, kind):
        return [request for request in self.pending.values() if isinstance(request, kind)]


class Conversations(RuleBasedStateMachine):
    """See the module."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="wooly-")
        self.before = open_fds()
        self.served = ServedStore(self.directory, FakeBackend("cpu")).__enter__()
        self.peers = []
        self.futures: dict[tuple[int, int], Future] = {}
        for _ in range(3):
            self.join()

    def teardown(self):
        try:
            for peer in self.peers:
                self._lost(peer)
                peer.raw.__exit__()
            self.peers = []
            self._nothing_is_left()
        finally:
            self.served.__exit__()
            shutil.rmtree(self.directory)
        wait_until(lambda: open_fds() <= self.before, "all descriptors to be closed")

    def _nothing_is_left(self):
        state, waiters = self.served.parts.state, self.served.parts.waiters
        wait_until(lambda: self.served.call(lambda: not state.clients), "the sessions to end")
        assert self.served.call(waiters.all) == []
        assert self.served.call(lambda: [state.turns.holder(name) for name in TURNS]) == [None, None]
        assert all(not model.readers and model.publisher is None for model in self.served.call(state.models.all))

    # Clients.

    @precondition(lambda self: len(self.peers) < 4)
    @rule()
    def join(self):
        raw = RawClient(self.served.paths.socket).__enter__()
        self.peers.append(Peer(raw, raw.welcome.client))

    @precondition(lambda self: len(self.peers) > 2)
    @rule(which=WHICH, cut=st.integers(0, 20))
    def lose(self, which, cut):
        """A client disconnects, perhaps in the middle of a message."""
        peer = self._peer(which)
        self.peers.remove(peer)
        payload = messages.encode(messages.Open(999, KEYS[0], "", "", "cpu", publish=True))
        self._lost(peer)
        peer.raw.send_bytes((wire.header(payload, 0) + payload)[:cut])
        peer.raw.__exit__()

    def _lost(self, peer):
        for (number, _), future in self.futures.items():
            if number == peer.number and not future.done():
                future.lost = True

    # Requests; several may be under way, also about the same thing.

    @rule(model=st.sampled_from(KEYS), publish=st.sampled_from([True, True, False]))
    def all_open(self, model, publish):
        for peer in self.peers:
            peer.request(lambda n: messages.Open(n, model, "", "", "cpu", publish))

    @rule(name=st.sampled_from(TURNS))
    def all_acquire(self, name):
        for peer in self.peers:
            peer.request(lambda n: messages.Acquire(n, name))

    @rule(
        which=WHICH,
        model=st.sampled_from(KEYS),
        publish=st.sampled_from([True, True, False]),
        early=st.sampled_from([False, False, True]),
    )
    def open(self, which, model, publish, early):
        """`early`: the cancel follows at once."""
        peer = self._peer(which)
        number = peer.request(lambda n: messages.Open(n, model, "", "", "cpu", publish))
        if early:
            peer.cancel(number)

    @rule(which=WHICH, name=st.sampled_from(TURNS), early=st.sampled_from([False, False, True]))
    def acquire(self, which, name, early):
        peer = self._peer(which)
        number = peer.request(lambda n: messages.Acquire(n, name))
        if early:
            peer.cancel(number)

    @rule(
        which=WHICH,
        name=st.sampled_from(TURNS),
        model=st.sampled_from(KEYS),
        what=st.sampled_from(["yield", "leave", "leave", "abandon", "remove"]),
    )
    def give_back(self, which, name, model, what):
        """Whether the client has it, waits for it, or neither."""
        make = {
            "yield": lambda n: messages.Yield(n, name),
            "leave": lambda n: messages.Leave(n, model),
            "abandon": lambda n: messages.Abandon(n, model, "test"),
            "remove": lambda n: messages.Remove(n, model),
        }
        self._peer(which).request(make[what])

    @precondition(lambda self: any(peer.pending for peer in self.peers))
    @rule(which=WHICH, request=WHICH)
    def cancel(self, which, request):
        peers = [peer for peer in self.peers if peer.pending]
        peer = peers[which % len(peers)]
        peer.cancel(list(peer.pending)[request % len(peer.pending)])

    @rule(which=WHICH, number=st.integers(1, 2**40))
    def cancel_nothing(self, which, number):
        peer = self._peer(which)
        if number not in peer.pending:
            peer.raw.send(messages.Cancel(number))

    @precondition(lambda self: any(peer.published for peer in self.peers))
    @rule(which=WHICH)
    def publish(self, which):
        """A publisher commits its model, while the others go on."""
        self._settle()
        peers = [peer for peer in self.peers if peer.published]
        if not peers:
            return
        peer = peers[which % len(peers)]
        model = min(peer.published)
        planned = peer.wait_for(peer.request(lambda n: messages.Plan(n, model, (BLOB,))))
        for segment in planned.segments:
            if segment.promised:
                number = segment.id
                peer.wait_for(peer.request(lambda n, number=number: messages.Fill(n, model, number)))
        manifest = encode(manifest_of(model, [BLOB]))
        attached = peer.wait_for(peer.request(lambda n: messages.Commit(n, model, manifest)))
        assert isinstance(attached, messages.Attached), attached

    # Requests of the store.

    @rule(which=WHICH)
    def ask(self, which):
        """At most a few per client, which answers, or does not."""
        peer = self._peer(which)
        if len([one for one in self.futures if one[0] == peer.number]) > 8:
            return
        sessions = self.served.parts.sessions
        ask = sessions.of(peer.number).ask(messages.SwapOut(0, "test"), within_s=60)
        future = asyncio.run_coroutine_threadsafe(ask, self.served._loop)
        known = set(peer.asked)
        while not (new := peer.asked - known):
            assert peer.pump(10.0), "the store does not ask"
        self.futures[peer.number, new.pop()] = future

    @precondition(lambda self: any(peer.asked for peer in self.peers))
    @rule(which=WHICH, request=WHICH, how=st.sampled_from(["done", "declined", "progress", "twice"]))
    def answer(self, which, request, how):
        """An answer in time reaches the store; one to a request that it withdrew, or that was answered, does not."""
        peers = [peer for peer in self.peers if peer.asked]
        peer = peers[which % len(peers)]
        number = sorted(peer.asked)[request % len(peer.asked)]
        future = self.futures[peer.number, number]
        if how == "progress":
            peer.raw.send(messages.Accepted(number))
            peer.raw.send(messages.Progress(number, 1, 2))
            return
        late = future.done()
        if how == "declined":
            peer.raw.send(messages.Failed(number, "declined", "test"))
        else:
            peer.raw.send(messages.Done(number, "test"))
        if how == "twice":
            peer.raw.send(messages.Failed(number, "declined", "too late"))
        if late:
            return
        with contextlib.suppress(DeclinedError):
            answer = future.result(10)
            assert (how != "declined", answer.detail) == (True, "test")

    @precondition(lambda self: any(not future.done() for future in self.futures.values()))
    @rule(which=WHICH)
    def withdraw(self, which):
        """The store cancels a request."""
        waiting = [future for future in self.futures.values() if not future.done()]
        waiting[which % len(waiting)].cancel()

    # The store's state is what the clients know.

    @invariant()
    def the_store_agrees(self):
        self._settle()
        self._until(lambda: self._views() == self.served.call(self._state), "views and state to agree", self._differ)
        for future in self.futures.values():
            if getattr(future, "lost", False):
                with contextlib.suppress(CancelledError):
                    assert isinstance(future.exception(10), ConnectionLostError)

    def _settle(self):
        """Act on everything that has arrived, and on what that causes."""
        for _ in range(2):
            for peer in self.peers:
                number = peer.request(messages.GetStatus)
                peer.wait_for(number)
        while any(peer.pump() for peer in self.peers):
            pass

    def _views(self):
        models, turns = {}, {}
        for peer in self.peers:
            for part, keys in (
                ("publisher", peer.published),
                ("reader", peer.read),
                ("waiter", {request.key for request in peer.waits(messages.Open)}),
            ):
                for name in keys:
                    models.setdefault(name, set()).add((part, peer.number))
            for part, names in (
                ("holder", peer.turns),
                ("waiter", {request.lease for request in peer.waits(messages.Acquire)}),
            ):
                for name in names:
                    turns.setdefault(name, set()).add((part, peer.number))
        return models, turns, sum(bool(peer) for peer in self.peers)

    def _state(self):
        state = self.served.parts.state
        models = {}
        for model in state.models.all():
            found = {("reader", number) for number in model.readers}
            found |= {("waiter", waiter.client) for waiter in model.waiters}
            if model.publisher is not None:
                found.add(("publisher", model.publisher))
            if found:
                models[model.key] = found
        turns = {
            name: {("waiter" if place else "holder", number) for place, number in enumerate(queue)}
            for name, queue in state.turns._queues.items()
        }
        return models, turns, len(state.clients)

    def _differ(self):
        return f"{self._views()} is not {self.served.call(self._state)}"

    def _peer(self, which):
        return self.peers[which % len(self.peers)]

    def _until(self, condition, what, said=lambda: ""):
        def pumped():
            while any(peer.pump() for peer in self.peers):
                pass
            return condition()

        try:
            wait_until(pumped, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {said()}") from None


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
