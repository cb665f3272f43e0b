"""`docs/protocol.md` matches the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from shared_store.base.errors import by_code
from shared_store.protocol import messages, wire
from shared_store.runtime.options import ServeOptions
from shared_store.store import asking, connection, exchange, server

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "protocol.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
CLASSES = list(dict.fromkeys((*get_args(messages.ClientMessage), *get_args(messages.StoreMessage))))
ABSTRACT = {messages.Message, messages.Request, messages.StoreRequest, messages.Reply}


def subclasses(cls):
    return {cls, *(found for direct in cls.__subclasses__() for found in subclasses(direct))}


def test_every_message_class_has_a_direction():
    """A class in neither union could be sent, but not decoded."""
    assert subclasses(messages.Message) - ABSTRACT == set(CLASSES)
    assert len({cls.__struct_config__.tag for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_message_is_named(cls):
    assert f"`{cls.__name__}`" in TEXT


def test_every_request_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \| `\w+`", TEXT, re.MULTILINE))
    assert rows == {cls.__name__ for cls in subclasses(messages.Request) - {messages.Request}}


def test_every_request_of_the_store_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \| [^`|]", TEXT, re.MULTILINE))
    assert {cls.__name__ for cls in subclasses(messages.StoreRequest) - {messages.StoreRequest}} <= rows


def test_the_order_of_every_request_is_described():
    """The list of those that run in order has those about a model, turn, workload or compaction, and no other."""
    listed = TEXT.partition("Order matters")[2].partition("All other requests")[0]
    ordered = {
        cls.__name__
        for cls in subclasses(messages.Request)
        if {"key", "lease", "workload"} & set(cls.__struct_fields__)
    }
    assert set(re.findall(r"`(\w+)`", listed)) == ordered | {"Compact", "Compacted", "AbandonCompaction"}


def test_every_named_message_exists():
    names = set(re.findall(r"`([A-Z][a-z]\w+)`", TEXT))
    assert names == {cls.__name__ for cls in CLASSES}


def test_every_error_code_exists():
    ending = TEXT.partition("## What ends a connection")[2].partition("\n## ")[0]
    codes = set(re.findall(r"\| `(\w+)` \|$", ending, re.MULTILINE)) | {"digest_mismatch", "out_of_memory", "memory"}
    assert len(codes) > 5
    for code in codes:
        assert by_code(code).code == code


def test_limits():
    said = {
        f"within {server.HELLO_WITHIN_S:.0f} s",
        f"`--max-clients` ({ServeOptions(Path()).max_clients:,})",
        f"{connection.MAX_BEFORE_HELLO >> 10} KiB before the greeting, {connection.MAX_FROM_CLIENT >> 20} MiB after it",
        f"may have {exchange.MAX_REQUESTS} requests under way, of {exchange.MAX_REQUEST_BYTES >> 20} MiB together",
        f"more than {exchange.MAX_REFUSED} requests in a row",
        f"more than {connection.MAX_UNREAD >> 20} MiB or {connection.MAX_UNREAD_FDS:,} fds",
        f"at most {connection.MAX_OFFERED_FDS:,}. A ticket",
        f"within {connection.LINGER_S:.0f} s.",
        f"at most {asking.MAX_ASKED} under way for one client",
        f"at most {wire.MAX_FROM_STORE >> 20} MiB\nwith at most {wire.MAX_FDS:,} fds",
        f"at most {wire.FDS_AT_ONCE} with one `sendmsg`",
    }
    assert {text for text in said if text not in TEXT} == set()
    assert wire.HEADER.format == ">IH"
