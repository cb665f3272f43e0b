"""Messages about the activity page of a client, see :mod:`shared_store.activity.layout`."""

from __future__ import annotations

from shared_store.protocol.messages.envelope import Reply, Request

CAPABILITY = "activity_page"
"""Of a store that answers :class:`GetActivityPage`."""


class GetActivityPage(Request, frozen=True, tag="get_activity_page"):
    """Ask for a page in which this client says whether it works. Answered by :class:`PageGranted`.

    A client has one page. A further request replaces it.
    """


class PageGranted(Reply, frozen=True, tag="page_granted"):
    """The message carries the fd of the page, to be mapped shared and writable. Its size is fixed by seals."""
