"""Joins a store as a workload, and every later store again."""

from __future__ import annotations

import logging
from typing import Protocol

from shared_store.base.errors import WoolyError
from shared_store.client.link import Link
from shared_store.protocol import messages

log = logging.getLogger(__name__)


class Joining(Protocol):
    """A workload as its client declares it. Called in any thread, by one at a time."""

    def request(self, number: int) -> messages.Join:
        """Return the present state as a request with an id."""

    def joined(self, answer: messages.Joined | None) -> None:
        """Hear the store's answer; None: this store does not list the workload."""


def join(link: Link, number: int, joining: Joining) -> None:
    """Join the store of a link.

    A refusal is logged, not raised: the client goes on, as one that belongs to no workload.

    Args:
        link: to the store.
        number: id of the request.
        joining: the workload.

    Raises:
        ConnectionLostError: the connection ended.
    """
    if messages.WORKLOADS not in link.capabilities:
        log.info("wooly: the store (version %s) does not list workloads", link.welcome.version)
        joining.joined(None)
        return
    try:
        answer, fds = link.call(joining.request(number), messages.Joined)
    except WoolyError as error:
        if not link.alive:
            raise
        log.warning("wooly: the store does not list this workload: %s [%s]", error, error.code)
        joining.joined(None)
        return
    fds.close()
    joining.joined(answer)
