"""The workloads that take part in turns, by the numbers that the arbiter knows, and what each of them used so far.

A workload gets another number whenever it joins the arbiter. What it used before is kept: an arbiter counts from zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from shared_store.compute import control
from shared_store.runtime.fds import OwnedFds


@dataclass
class Used:
    """What a workload used, in seconds, with all arbiters together; see :class:`control.Row`."""

    device_s: float = 0.0
    estimated_s: float = 0.0
    held_s: float = 0.0

    def plus(self, row: control.Row | None) -> Used:
        """Return the sum with what the present arbiter reports."""
        if row is None:
            return self
        return Used(self.device_s + row.device_s, self.estimated_s + row.estimated_s, self.held_s + row.held_s)


@dataclass
class Member:
    """A workload that takes part.

    Attributes:
        added: what the arbiter is told, with the present priority and share.
        ungated: why it is never held; empty: it may be.
        fds: page and socket for the arbiter, until it has them.
        row: what the arbiter reported last.
    """

    added: control.Add
    ungated: str
    fds: OwnedFds
    row: control.Row | None = None


@dataclass
class Members:
    """All of them, by the id of their workload."""

    _members: dict[str, Member] = field(default_factory=dict)
    _used: dict[str, Used] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __bool__(self) -> bool:
        return bool(self._members)

    def get(self, workload: str) -> Member | None:
        """Return the member of a workload."""
        return self._members.get(workload)

    def all(self) -> list[tuple[str, Member]]:
        """Return ids and members."""
        return list(self._members.items())

    def used(self, workload: str) -> Used:
        """Return what a workload used so far."""
        member = self._members.get(workload)
        return self._used.get(workload, Used()).plus(None if member is None else member.row)

    def next_number(self) -> int:
        """Return a number that no member had."""
        return next(self._numbers)

    def put(self, workload: str, member: Member) -> None:
        """Add a member, which its workload does not have yet."""
        self._members[workload] = member

    def leave(self, workload: str) -> Member | None:
        """Remove the member of a workload, which may join again; return it. Closes what was not passed on."""
        member = self._members.pop(workload, None)
        if member is not None:
            self._used[workload] = self._used.get(workload, Used()).plus(member.row)
            member.fds.close()
        return member

    def forget(self, workload: str) -> Member | None:
        """Remove a workload that is gone, and what it used; return its member."""
        member = self.leave(workload)
        self._used.pop(workload, None)
        return member

    def known(self) -> set[str]:
        """Return the ids of workloads about which anything is known."""
        return {*self._members, *self._used}

    def report(self, rows: Iterable[control.Row]) -> None:
        """Take up what the arbiter reports. Rows of members that left meanwhile are dropped.

        A member that it reported before and does not any more has left it: its client closed the socket.
        """
        reported = {row.number: row for row in rows}
        for workload, member in self.all():
            row = reported.get(member.added.number)
            if row is not None:
                member.row = row
            elif member.row is not None:
                self.leave(workload)
