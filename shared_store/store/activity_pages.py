"""The activity pages of connected clients."""

from __future__ import annotations

from shared_store.activity.layout import Activity
from shared_store.activity.page import ActivityPage


class ActivityPages:
    """At most one page for each client, by its number."""

    def __init__(self) -> None:
        self._pages: dict[int, ActivityPage] = {}

    def put(self, client: int, page: ActivityPage) -> None:
        """Set a client's page, in place of an earlier one."""
        self._pages[client] = page

    def drop(self, client: int) -> None:
        """Drop the page of a client that is gone. Without effect if it has none."""
        self._pages.pop(client, None)

    def read(self, client: int) -> Activity | None:
        """Return what a client says; None if it has no page, or wrote what cannot be right."""
        page = self._pages.get(client)
        return None if page is None else page.read()
