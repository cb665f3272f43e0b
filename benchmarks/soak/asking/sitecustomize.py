"""Makes the stores of a soak ask their clients to swap out, at random. Python imports it at its start.

No request of a client makes a store ask another one, so the soak adds that to the store: this folder is on
``PYTHONPATH`` of the process that starts it. In all other processes, and in a store of protocol 1, it does nothing.
Each answer is a line in the store's log, which ``soak/command.py`` counts.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from typing import Any

ASKED = 0.3
"""Share of connections that are asked, some of them more than once."""
WITHIN_S = 20.0
"""Seconds after which a client that does not answer is an error: much longer than its answers take."""

log = logging.getLogger("soak")


async def _ask(session: Any) -> None:
    from shared_store.base.errors import (
        ConnectionLostError,
        DeclinedError,
        TimedOutError,
        TooManyRequestsError,
        UnsupportedError,
    )
    from shared_store.protocol import messages

    while random.random() < ASKED:
        await asyncio.sleep(random.random() * 0.2)
        impatient = random.random() < 0.2
        within_s = random.random() * 0.02 if impatient else WITHIN_S
        try:
            await session.ask(messages.SwapOut(0, "the soak", within_s), within_s=within_s)
        except ConnectionLostError:
            outcome = "disconnected"
        except DeclinedError:
            outcome = "declined"
        except UnsupportedError:  # the client has no handler yet, or never
            outcome = "unsupported"
        except TooManyRequestsError:
            outcome = "too_many"
        except TimedOutError:
            outcome = "cancelled" if impatient else "unanswered"
        else:
            outcome = "done"
        log.info("soak: asked %s", outcome)
        if outcome == "disconnected":
            return


def _install() -> None:
    try:
        from shared_store.store.exchange import Exchange
    except ImportError:  # protocol 1
        return
    stock, asking = Exchange.begin, set()

    def begin(self: Any) -> None:
        stock(self)
        task = asyncio.ensure_future(_ask(self.session))
        asking.add(task)  # the event loop has weak references only
        task.add_done_callback(asking.discard)

    Exchange.begin = begin  # type: ignore[method-assign]  # what this module is for


if "shared_store.daemon" in sys.orig_argv:
    _install()
