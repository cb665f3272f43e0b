"""A client that plays a workload: it has no memory, and reports what a test says."""

from __future__ import annotations

import threading
import uuid

from shared_store.client.session import CALL_TIMEOUT_S, Session
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import Identity

MIB = 1 << 20


def amounts(nbytes, device):
    """Return bytes by device, from MiB on one device or from a dict of MiB."""
    found = nbytes if isinstance(nbytes, dict) else {device: nbytes}
    return tuple(messages.DeviceBytes(one, round(mib * MIB)) for one, mib in found.items())


class PlainWorkload:
    """One workload over one session. Sizes are in MiB. It leaves when it is asked to, unless `leave` is replaced.

    `asked`: the store's requests to leave, in order. `away`: set once it left, until it takes memory again.
    """

    def __init__(
        self,
        directory,
        name,
        *,
        device="fake",
        priority=0,
        needs=0,
        stays=0,
        swap=True,
        member_of="",
        share=0.0,
        exclusive=False,
    ):
        self.id = member_of or uuid.uuid4().hex
        self.device, self.needs, self.stays = device, needs, stays
        identity = Identity(name, "vllm", priority, swap, member_of=self.id, share=share, exclusive=exclusive)
        self.session = Session(directory, name, identity=identity)
        self.asked = []
        self.away = threading.Event()
        self.leave = lambda _request, _call: None
        self.name = self.refusal = ""
        self.session.serve(messages.SwapOut, self._swap_out)
        self.session.serve(messages.SwapIn, self._swap_in)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.session.close()

    def call(self, request, kind=messages.Done, timeout_s=CALL_TIMEOUT_S):
        return self.session._call(request, kind, timeout_s, repeat=False)

    def join(self, state="swapped", private=None, *, starting=False, refusal="", name=""):
        """Join; return the name and priority that the store answers."""
        self.refusal = refusal
        private = (self.needs if state == "resident" else self.stays) if private is None else private
        request = messages.Join(
            self.session._next(),
            self.id,
            state,
            amounts(private, self.device),
            amounts(self.stays, self.device),
            amounts(self.needs, self.device),
            refusal,
            starting,
            name,
        )
        joined = self.call(request, messages.Joined)
        self.name = joined.name
        return joined.name, joined.priority

    def report(self, state, private=None, *, moved=0, **steps):
        if private is None:
            private = self.stays if state in {"swapped", "checkpointed"} else self.needs
        self.call(
            messages.ReportWorkload(
                self.session._next(),
                self.id,
                state,
                amounts(private, self.device),
                amounts(self.stays, self.device),
                amounts(self.needs, self.device),
                self.refusal,
                moved=moved,
                steps=tuple(messages.StepTime(step, seconds) for step, seconds in steps.items()),
            )
        )

    def take_room(self, nbytes=None, timeout_s=20.0):
        """Wait until it may allocate what it needs; return the answer."""
        self.away.clear()
        wanted = amounts(self.needs - self.stays if nbytes is None else nbytes, self.device)
        return self.call(messages.TakeRoom(self.session._next(), self.id, wanted), messages.RoomTaken, timeout_s)

    def enter(self, nbytes=None, timeout_s=20.0):
        """Take memory, and report that it is resident; return the answer to the former."""
        taken = self.take_room(nbytes, timeout_s)
        self.report("resident")
        return taken

    def entering(self, timeout_s=20.0):
        """Enter in a thread; return it, started. Its `answer` is the store's, or the error."""
        return InThread(lambda: self.enter(timeout_s=timeout_s))

    def explain(self, name=""):
        return self.call(messages.ExplainWorkload(self.session._next(), name or self.name), messages.Explanation)

    def _swap_out(self, request, call):
        self.asked.append(request)
        self.leave(request, call)
        self.report("draining")
        self.report("leaving")
        self.report("swapped", drain=0.01, copy=0.02)
        self.away.set()
        return "left"

    def _swap_in(self, _request, _call):
        self.enter()


class InThread:
    """A call in a thread. `answer`: what it returned or raised, after `join`."""

    def __init__(self, function):
        self.answer = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.answer = self._function()
        except Exception as error:  # noqa: BLE001 - `join` raises it
            self.answer = error

    @property
    def waits(self):
        return self._thread.is_alive()

    def join(self, timeout_s=20.0):
        """Wait for the end; return the answer, or raise the error."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the call did not end"
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer
