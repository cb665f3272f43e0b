"""Tickets of offers: which descriptors a client may send, and for what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from shared_store.base.errors import ProtocolError

MAX_TICKETS = 64
"""Tickets that a client may have at a time; a further one replaces the oldest."""


@dataclass(frozen=True)
class _Ticket:
    key: str
    fds: int


class Tickets:
    """The unused tickets of one connection. A model has at most one."""

    def __init__(self) -> None:
        self._tickets: dict[int, _Ticket] = {}
        self._numbers = itertools.count(1)

    def issue(self, key: str, fds: int) -> int:
        """Return a new ticket for an offer of the model ``key`` with this number of descriptors."""
        self._tickets = {number: ticket for number, ticket in self._tickets.items() if ticket.key != key}
        if len(self._tickets) >= MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        number = next(self._numbers)
        self._tickets[number] = _Ticket(key, fds)
        return number

    def redeem(self, number: int, key: str, fds: int) -> None:
        """Use a ticket up.

        Raises:
            ProtocolError: no unused ticket has this number, or it is for another model or fewer descriptors.
        """
        ticket = self._tickets.get(number)
        if ticket is None or ticket.key != key or fds > ticket.fds:
            raise ProtocolError("an offer without the ticket of its refused rejoin")
        del self._tickets[number]

    @property
    def fds(self) -> int:
        """The most descriptors that a message may have now."""
        return max((ticket.fds for ticket in self._tickets.values()), default=0)
