"""The store's requests to one client, and the client's answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from shared_store.base.errors import ConnectionLostError, TimedOutError, TooManyRequestsError, by_code
from shared_store.protocol import messages
from shared_store.store.session import Heard

MAX_ASKED = 16
"""Requests of the store that wait for one client's answers."""

Answered = messages.Accepted | messages.Progress | messages.Done | messages.Failed
"""What a client says about a request of the store."""


@dataclass(frozen=True, eq=False)
class _Asked:
    answer: asyncio.Future[messages.Done | messages.Failed]
    heard: Heard


class Asking:
    """Requests under way over one connection. An answer to a request that is not under way (any more) is ignored."""

    def __init__(self, send: Callable[[messages.Message], None], gone: asyncio.Event) -> None:
        """Send with ``send``, until ``gone`` is set and :meth:`ended` is called."""
        self._send = send
        self._gone = gone
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    async def ask(self, request: messages.StoreRequest, within_s: float, heard: Heard) -> messages.Done:
        """Send a request, and wait for its answer. See :meth:`Session.ask`."""
        name = type(request).__name__
        if self._gone.is_set():
            raise ConnectionLostError(f"the client disconnected before it was asked for {name}")
        if len(self._asked) >= MAX_ASKED:
            raise TooManyRequestsError(f"{MAX_ASKED} requests wait for this client's answers")
        number = next(self._ids)
        asked = self._asked[number] = _Asked(asyncio.get_running_loop().create_future(), heard)
        self._send(msgspec.structs.replace(request, id=number))
        try:
            async with asyncio.timeout(within_s):
                answer = await asked.answer
        except TimeoutError as error:
            self._send(messages.Cancel(number))
            raise TimedOutError(f"the client did not answer {name} within {within_s:g} s") from error
        except asyncio.CancelledError:
            self._send(messages.Cancel(number))
            raise
        finally:
            # An error that is raised refers to this frame, and the answer to that error.
            del self._asked[number], asked
        if isinstance(answer, messages.Failed):
            raise by_code(answer.code)(answer.message)
        return answer

    def answered(self, message: Answered) -> None:
        """Pass on what the client says."""
        asked = self._asked.get(message.id)
        if asked is None:
            return
        if isinstance(message, messages.Done | messages.Failed):
            if not asked.answer.done():
                asked.answer.set_result(message)
        else:
            asked.heard(message)

    def ended(self) -> None:
        """Fail all requests, because the connection ended."""
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(ConnectionLostError("the client disconnected before it answered"))
