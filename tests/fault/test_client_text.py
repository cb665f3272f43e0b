"""Text that a client chooses: it adds no lines to the log, and does not fill the store."""

from __future__ import annotations

import pytest
from support.content import key
from support.rawclient import RawClient

from shared_store.base.text import escape, one_line
from shared_store.protocol import messages
from shared_store.runtime.log_lines import LONGEST_MESSAGE

FORGED = "2026-01-01 00:00:00,000 CRITICAL forged: the store is on fire"
EVIL = f"model\n{FORGED}\r\x1b[2J\u2028{FORGED}"
LONG = "x" * (1 << 20)


def sent(socket, *requests, name="raw"):
    """Send requests over one connection; return their answers."""
    with RawClient(socket, greet=False) as raw:
        raw.send(messages.Hello(messages.VERSION, name, "0"))
        assert isinstance(raw.receive(), messages.Welcome)
        answers = []
        for request in requests:
            raw.send(request)
            answers.append(raw.receive())
        return answers


@pytest.mark.parametrize(
    "request_of",
    [
        lambda text: messages.ReportFallback(1, text, text),
        lambda text: messages.Open(1, key(1), text, text, "cpu", publish=True),
        lambda text: messages.Offer(1, text, b"", (), ()),
        lambda text: messages.Quarantine(1, text, ()),
        lambda text: messages.Remove(1, text),
    ],
    ids=["fallback", "open", "offer", "quarantine", "remove"],
)
def test_text_of_a_client_is_one_line_of_the_log(store, request_of):
    sent(store.paths.socket, request_of(EVIL), name=EVIL)
    sent(store.paths.socket, request_of(LONG))
    log = store.log()
    assert not [line for line in log.split("\n") if line.startswith(FORGED)]
    assert "\x1b" not in log
    assert "\r" not in log
    assert "\u2028" not in log
    assert max(map(len, log.split("\n"))) < LONGEST_MESSAGE + 200


def test_the_version_of_a_client_that_is_refused_is_one_line_of_the_log(store):
    with RawClient(store.paths.socket, greet=False) as raw:
        raw.send(messages.Hello(2**31, "raw", f"9\n{FORGED}"))
        assert raw.refusal() == "protocol_version"
    assert not [line for line in store.log().split("\n") if line.startswith(FORGED)]


def test_reports_of_models_that_the_client_does_not_read_are_refused(store):
    """They would take memory without bound."""
    reports = [messages.Report(number, f"{number:064x}", 1) for number in range(1, 30)]
    answers = sent(store.paths.socket, *reports)
    assert {(type(answer), answer.code) for answer in answers} == {(messages.Failed, "model_not_found")}


def test_reports_of_readers_count(store):
    """Also of the publisher, which is a reader after its commit."""
    client = store.client("reader")
    client.publish(key(1), [[1, 1 << 20]])
    client.session.report(key(1), 4096)
    assert [row.private_bytes for row in client.session.status().clients] == [4096]


@pytest.mark.parametrize(
    ("text", "longest", "shown"),
    [
        ("plain text", 20, "plain text"),
        ("Grüße 模型 🚀", 20, "Grüße 模型 🚀"),
        ("a\nb\t\x00\x7f", 40, r"a\nb\t\x00\x7f"),
        ("\u2028\u202e\U000e0001", 40, r"\u2028\u202e\U000e0001"),
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abcde…"),
        ("\n\n\n\n", 5, r"\n\n…"),
        ("", 5, ""),
    ],
)
def test_one_line(text, longest, shown):
    assert one_line(text, longest) == shown
    assert one_line(text, longest).isprintable()


def test_escaped_text_that_is_printable_is_the_same():
    assert escape("a\\nb") == "a\\nb"
