"""What a session keeps of a model that it reads: enough to give it back to a store that lost it.

The fds are few (one a segment) and cost nothing while the store has the memory anyway. They are closed with the last
reference, so that a session may be closed by any thread while another one is giving the model back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from shared_store.protocol import messages
from shared_store.protocol.wire import close_fds


class Holding:
    """One model: what the store said of it, and an fd of each of its segments."""

    def __init__(self, attached: messages.Attached, fds: Sequence[int]) -> None:
        """Keep copies of the fds, which stay the caller's."""
        self.attached = attached
        self.private_bytes = 0
        self.fds = tuple(os.dup(fd) for fd in fds)

    def rejoin(self, number: int, key: str) -> messages.Rejoin:
        """The request to be a reader again."""
        return messages.Rejoin(number, key, tuple(one.id for one in self.attached.segments), self.private_bytes)

    def offer(self, number: int, key: str) -> messages.Offer:
        """The request to take the model back; :attr:`fds` go with it."""
        found = self.attached
        return messages.Offer(number, key, found.manifest, found.places, found.segments, self.private_bytes)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the process's end closes everything anyway
            close_fds(self.__dict__.get("fds", ()))
