"""A workload as the arbiter sees it: its page, and the arbiter's end of its socket.

Words that the workload writes are any words of 8 bytes. A time after now is now, and no sum grows faster than time
passes, so a workload can only misrepresent itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from dataclasses import dataclass
from typing import Final

from shared_store.base.errors import ProtocolError
from shared_store.compute import layout
from shared_store.compute.control import Add, Change
from shared_store.compute.page import map_page
from shared_store.compute.snapshot import Kind, Member, Permit
from shared_store.runtime.fds import OwnedFd

MOST_IN_FLIGHT: Final = 1 << 20
"""Batches in flight that are believed."""

MOST_RINGS: Final = 1000
"""Rings between two reports, after which a workload is not listened to until the next one: looks still see its page."""

_S: Final = 1e-9
_BEGINS: Final = {Kind.FREE, Kind.TURN}


@dataclass
class _Seen:
    """Words at the last look, and what followed from them."""

    at: int
    begun: int = 0
    ended: int = 0
    busy: int = 0
    held: int = 0


class Peer:
    """One workload. Times are ``CLOCK_MONOTONIC`` in nanoseconds, unless they are named seconds."""

    def __init__(self, add: Add, page: OwnedFd, bell: OwnedFd, now: int) -> None:
        """Take up a workload, and over its descriptors. Raises :class:`ProtocolError` if they are something else."""
        with page, bell:
            self._words = map_page(page)
            try:
                self._socket = socket.socket(fileno=bell.fileno())
            except OSError as error:
                raise ProtocolError(f"workload {add.number} came without a socket: {error}") from error
            bell.detach()
        self._socket.setblocking(False)
        self._added = now
        self._seen = _Seen(now)
        self._permit = Permit(Kind.FREE)
        self._one_step: float | None = None
        self._rung: tuple[int, int, int] | None = None
        self.rings = 0
        self.listened = True
        self.contended = False
        self.member = Member(
            add.number,
            add.priority,
            frozenset(add.devices),
            share=add.share,
            gated=add.gated,
            progressed=now * _S,
            idle_since=now * _S,
        )

    def fileno(self) -> int:
        """Return the descriptor of the socket, borrowed."""
        return self._socket.fileno()

    def change(self, change: Change) -> None:
        """Give it another priority or share, or other devices."""
        self.member = dataclasses.replace(
            self.member, priority=change.priority, share=change.share, devices=frozenset(change.devices)
        )

    def contend(self, *, contended: bool) -> None:
        """Say whether others share a device. Look at the page after that: earlier changes did not ring."""
        if contended != self.contended:
            self.contended = contended
            self._words[layout.CONTENDED_WORD] = int(contended)

    def hear(self) -> bool:
        """Read the bytes that rang. Returns False at the end of the socket: the workload is gone."""
        self.rings += 1
        try:
            return bool(self._socket.recv(4096))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def look(self, now: int) -> tuple[float, float]:
        """Read the page. Returns seconds since the last look for which it was busy, and for which it was held."""
        words, seen, old = self._words, self._seen, self.member
        words[layout.LOOKED_WORD] = now
        state, begun, ended = words[layout.STATE_WORD], words[layout.BEGUN_WORD], words[layout.ENDED_WORD]
        held_since = words[layout.HELD_SINCE_WORD]
        busy = words[layout.BUSY_WORD] + _lasts(words[layout.BUSY_SINCE_WORD], now)
        held = words[layout.HELD_WORD] + _lasts(held_since, now)
        passed = max(0, now - seen.at)
        busy_s = min(max(0, busy - seen.busy), passed) * _S
        held_s = min(max(0, held - seen.held), passed) * _S
        working = bool(state & layout.WORKING or held_since)  # to wait for a step is to have work
        in_flight = min(state & layout.IN_FLIGHT, MOST_IN_FLIGHT)
        stepped = begun != seen.begun or ended != seen.ended
        idle_since = old.idle_since
        if in_flight:
            idle_since = None
        elif stepped or idle_since is None:
            idle_since = now * _S
        self.member = dataclasses.replace(
            old,
            working=working,
            in_flight=in_flight,
            progressed=now * _S if stepped or (working and not old.working) else old.progressed,
            idle_since=idle_since,
            held_since=min(max(held_since, self._added), now) * _S if held_since else None,
        )
        self._seen = _Seen(now, begun, ended, max(busy, seen.busy), max(held, seen.held))
        return busy_s, held_s

    def used(self, device_s: float) -> None:
        """Say how much it used of its devices so far."""
        self.member = dataclasses.replace(self.member, used_s=device_s)

    def loses(self, permit: Permit) -> bool:
        """Whether a permit takes away what the last one gave for more than one step."""
        return self._permit.kind in _BEGINS and permit.kind not in _BEGINS

    def allow(self, permit: Permit) -> None:
        """Write a permit."""
        words, old = self._words, self._permit
        if permit == old:
            return
        self._permit = permit
        self._rung = None  # what it gives now has to be told, also where the workload knew and lost the same before
        if permit.short != old.short:
            words[layout.SHORT_UNTIL_WORD] = layout.FREE if permit.short else 0
        if permit.kind is Kind.ONE_STEP and permit.until != self._one_step:
            self._one_step = permit.until
            words[layout.ALLOWED_WORD] = (words[layout.BEGUN_WORD] + 1) & layout.FREE
        elif permit.kind in _BEGINS:
            self._one_step = None
            words[layout.ALLOWED_WORD] = 0
        if permit.kind is Kind.FREE:
            words[layout.UNTIL_WORD] = layout.FREE
        else:
            words[layout.UNTIL_WORD] = max(1, int(permit.until / _S)) if permit.kind is Kind.TURN else 0

    @property
    def moved(self) -> bool:
        """Whether a step began or ended since the last look."""
        words, seen = self._words, self._seen
        return (words[layout.BEGUN_WORD], words[layout.ENDED_WORD]) != (seen.begun, seen.ended)

    def may_begin(self, now: int) -> bool:
        """Return whether the workload may begin a step."""
        words = self._words
        until = words[layout.UNTIL_WORD]
        return bool(until == layout.FREE or until > now or words[layout.BEGUN_WORD] < words[layout.ALLOWED_WORD])

    def held(self, now: int) -> bool:
        """Return whether it waits to begin a step, and may not."""
        return self.member.held_since is not None and not self.may_begin(now)

    def tell(self, now: int) -> None:
        """Ring once if it waits to begin a step, and may now. Never blocks: unread bytes ring as well."""
        words = self._words
        held_since = words[layout.HELD_SINCE_WORD]
        if not held_since or not self.may_begin(now):
            return
        told = (held_since, words[layout.UNTIL_WORD], words[layout.ALLOWED_WORD])
        if told != self._rung:
            self._rung = told
            with contextlib.suppress(OSError):
                self._socket.send(b"\0", socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """End the socket, which tells the workload that it has no arbiter."""
        self._socket.close()


def _lasts(since: int, now: int) -> int:
    return max(0, now - since) if since else 0
