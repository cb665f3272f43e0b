"""A model that a session reads, as it is retained to rejoin a restarted store: the manifest, and duplicate descriptors.

One descriptor for each segment; they add no memory while the store has the segments. They are closed when the last
reference to the object is gone, because one thread may close a session while another offers the model to a store.
"""

from __future__ import annotations

import weakref

import msgspec

from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds


class RetainedModel:
    """The store's answer about a model, and a descriptor for each of its segments."""

    def __init__(self, attached: messages.Attached, fds: OwnedFds) -> None:
        """Duplicate the descriptors; ``fds`` is only borrowed. Raises :class:`OSError` without a free descriptor."""
        self.attached = attached
        self.private_bytes = 0
        self.fds = OwnedFds.duplicates(fds.filenos())
        weakref.finalize(self, self.fds.close)

    def rejoin(self, number: int, key: str) -> messages.Rejoin:
        """Return the request to become a reader again."""
        return messages.Rejoin(number, key, tuple(one.id for one in self.attached.segments), self.private_bytes)

    def offer(self, number: int, key: str, ticket: int) -> messages.Offer:
        """Return the request that offers the model's segments; :attr:`fds` are sent with it.

        ``ticket`` is that of the refused rejoin; 0 for a store of protocol 1.
        """
        found = self.attached
        return messages.Offer(number, key, found.manifest, found.places, found.segments, self.private_bytes, ticket)


class RetainedHostCopies(RetainedModel):
    """A model that this process sleeps with: its host copies take the place of its segments."""

    def rejoin(self, number: int, key: str) -> messages.Rejoin:
        """Return the request to be a reader that is away again."""
        return msgspec.structs.replace(super().rejoin(number, key), away=True)

    def offer(self, number: int, key: str, ticket: int) -> messages.Offer:
        """Return the request that offers the host copies."""
        return msgspec.structs.replace(super().offer(number, key, ticket), away=True)
