"""Each request of the protocol has exactly one handler."""

from __future__ import annotations

import asyncio
from typing import get_args

import pytest

from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages
from shared_store.store.assembly import Parts

REQUESTS = [cls for cls in get_args(messages.ClientMessage) if issubclass(cls, messages.Request)]


@pytest.fixture
def dispatch():
    parts = Parts({"fake": FakeBackend()}, {})
    return parts.dispatch(lambda: pytest.fail("no request here asks for the status"), asyncio.Event())


def test_every_request_of_a_client_is_in_the_table(dispatch):
    """And nothing else is."""
    assert len(REQUESTS) > 20
    assert set(dispatch.table) == set(REQUESTS)


def test_no_two_requests_share_a_handler(dispatch):
    assert len(set(map(id, dispatch.table.values()))) == len(REQUESTS)
