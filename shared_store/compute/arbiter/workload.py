"""A workload on the arbiter's side: its page and its socket, and what they showed so far.

Nothing that a workload writes is trusted. Times after now count as now, counters that go back as no progress.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque

from shared_store.compute import control, layout
from shared_store.compute.snapshot import Kind, Member, Permit

NS = 1e9
WINDOW_S = 10.0
"""Seconds over which the used share is measured."""


class ArbitratedWorkload:
    """One workload.

    Attributes:
        number: that the store gave it.
        devices: names.
        bell: this end of its socket.
        priority: 0 (highest) to 4.
        share: percent, see :class:`~shared_store.compute.snapshot.Member`.
        gated: whether it may be held.
        used_s: seconds of its devices that it used so far.
        estimated_s: the part of them that was estimated.
        stalled: it has work and makes no progress.
    """

    def __init__(self, added: control.Add, words: memoryview, bell: socket.socket, now: float) -> None:
        """Take over the words of its page, and its socket. ``now``: monotonic seconds."""
        self.number, self.devices = added.number, frozenset(added.devices)
        self.priority, self.share, self.gated = added.priority, added.share, added.gated
        self.bell = bell
        bell.setblocking(False)
        self._words = words
        self.used_s = self.estimated_s = 0.0
        self.stalled = False
        self._busy_ns = self._busy(int(now * NS))
        self._progress = self._seen()
        self._progressed = now
        self._ended = words[layout.ENDED_WORD]
        self._idle_since: float | None = now
        self._held_since: float | None = None
        self._step: float | None = None
        self._rung: tuple[int, int, int] | None = None
        self._samples = deque([(now, 0.0)])

    def close(self) -> None:
        """Close the socket. The workload goes on without an arbiter."""
        self.bell.close()

    def hear(self) -> bool:
        """Read what it rang; return False if it is gone."""
        while True:
            try:
                if not self.bell.recv(4096):
                    return False
            except BlockingIOError:
                return True
            except OSError:
                return False

    # What the page shows.

    def busy_s(self, now: float) -> float:
        """Return the seconds for which it was busy since the last call."""
        busy = self._busy(int(now * NS))
        passed, self._busy_ns = max(0, busy - self._busy_ns), max(busy, self._busy_ns)
        return passed / NS

    def look(self, now: float) -> Member:
        """Read the page. ``now``: monotonic seconds."""
        words, now_ns = self._words, int(now * NS)
        words[layout.LOOKED_WORD] = now_ns
        state, seen = words[layout.STATE_WORD], self._seen()
        if seen != self._progress:
            self._progress, self._progressed = seen, now
        ended, in_flight = words[layout.ENDED_WORD], state & layout.IN_FLIGHT
        if in_flight:
            self._idle_since = None
        elif self._idle_since is None or ended != self._ended:
            self._idle_since = now
        self._ended = ended
        held_since = words[layout.HELD_SINCE_WORD]
        self._held_since = min(held_since, now_ns) / NS if held_since else None
        return Member(
            self.number,
            self.priority,
            self.devices,
            self.share,
            self.gated,
            bool(state & layout.WORKING),
            in_flight,
            self._progressed,
            self._idle_since,
            self._held_since,
            self.used_s,
        )

    def row(self, now: float) -> control.Row:
        """Return what it used so far."""
        samples = self._samples
        samples.append((now, self.used_s))
        while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        since, used = samples[0]
        passed = now - since
        share = (self.used_s - used) / passed if passed > 0 else 0.0
        held_ns = self._words[layout.HELD_WORD]
        waiting = 0.0 if self._held_since is None else max(0.0, now - self._held_since)
        return control.Row(
            self.number,
            self.used_s,
            self.estimated_s,
            held_ns / NS + waiting,
            min(1.0, share),
            self._held_since is not None,
            self.stalled,
        )

    # What the arbiter says.

    def permit(self, permit: Permit, *, contended: bool) -> None:
        """Write what it may do, and ring if that lets it begin a step for which it waits."""
        words = self._words
        words[layout.CONTENDED_WORD] = int(contended)
        words[layout.SHORT_UNTIL_WORD] = layout.FREE if permit.short else 0
        if permit.kind is Kind.ONE_STEP:
            if self._step != permit.until:
                self._step = permit.until
                words[layout.ALLOWED_WORD] = (words[layout.BEGUN_WORD] + 1) & layout.FREE
        elif self._step is not None:
            self._step = None
            words[layout.ALLOWED_WORD] = 0
        until = {Kind.FREE: layout.FREE, Kind.TURN: int(permit.until * NS)}.get(permit.kind, 0)
        words[layout.UNTIL_WORD] = until
        self._ring_if_waiting(until)

    def _ring_if_waiting(self, until: int) -> None:
        """Ring once for each hold and each permission."""
        words = self._words
        since, allowed = words[layout.HELD_SINCE_WORD], words[layout.ALLOWED_WORD]
        may = until or words[layout.BEGUN_WORD] < allowed
        if not since or not may:
            self._rung = None
            return
        if self._rung != (since, until, allowed):
            self._rung = (since, until, allowed)
            with contextlib.suppress(OSError):  # full: it has something to hear; gone: the loop hears it
                self.bell.send(b"\0", socket.MSG_NOSIGNAL)

    def _seen(self) -> tuple[int, int, bool]:
        words = self._words
        return words[layout.BEGUN_WORD], words[layout.ENDED_WORD], bool(words[layout.STATE_WORD] & layout.WORKING)

    def _busy(self, now_ns: int) -> int:
        words = self._words
        since = words[layout.BUSY_SINCE_WORD]  # read first: see ComputeGate.end
        busy: int = words[layout.BUSY_WORD]
        return busy + max(0, now_ns - since) if since else busy
