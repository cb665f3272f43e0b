"""Asks the store of a link for an activity page, if it has such pages."""

from __future__ import annotations

import logging

from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import ProtocolError, WoolyError
from shared_store.client.link import Link
from shared_store.protocol import messages
from shared_store.protocol.messages import activity

log = logging.getLogger(__name__)


def attach_page(link: Link, number: int, writer: ActivityWriter) -> None:
    """Have a writer write to a new page of a store. Without effect for a store that has no pages.

    A failure is logged, not raised: the page is for the status only.

    Args:
        link: to the store.
        number: id of the request.
        writer: of this client.
    """
    if activity.CAPABILITY not in link.welcome.capabilities:
        return
    try:
        _, fds = link.call(messages.GetActivityPage(number), messages.PageGranted)
        with fds:
            if len(fds) != 1:
                raise ProtocolError(f"the store answered GetActivityPage with {len(fds)} descriptors")
            writer.attach(fds.detach()[0])
    except WoolyError as error:
        log.warning("wooly: the store does not show this client's activity: %s [%s]", error, error.code)
