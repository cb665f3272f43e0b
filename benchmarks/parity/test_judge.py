"""The outcome of a row follows from the answers of its engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks.parity.judge import judge

TOKENS = [[*range(10)], [*range(10, 20)]]
OTHERS = [[*range(10)], [*range(11, 21)]]
LEASE: dict[str, Any] = {"role": "reader", "mapped_bytes": 990, "private_bytes": 10}

Answers = dict[str, list[dict[str, Any]]]


def _answers(
    publisher: list[list[int]] = TOKENS,
    reader: list[list[int]] = TOKENS,
    *,
    again: list[list[int]] = TOKENS,
    refused: Iterable[str] = (),
    lease: dict[str, Any] = LEASE,
) -> Answers:
    return {
        "stock": [{"answer": TOKENS}, {"answer": again}],
        "publisher": [{"answer": publisher, "refused": list(refused), **lease}, {"answer": publisher}],
        "reader": [{"answer": reader, "refused": list(refused), **lease}, {"answer": reader}],
    }


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        (_answers(), "equal", ""),
        (_answers(refused=["because [unsupported]"]), "refused", "because [unsupported]"),
        (_answers(reader=OTHERS), "differs", "answer 1 of the reader is not stock's"),
        (_answers(publisher=OTHERS, refused=["because [x]"]), "differs", "not shared: because [x]"),
        (_answers(again=OTHERS), "differs", "stock vLLM does not answer twice alike either"),
        (_answers(lease={"role": None}), "failed", "the reader maps nothing"),
        (_answers(lease=LEASE | {"mapped_bytes": 0}), "failed", "the reader maps nothing"),
    ],
)
def test_outcome_follows_from_the_answers(answers: Answers, status: str, words: str) -> None:
    """Neither a refusal nor a second answer hides an answer that is not stock's."""
    outcome = judge(answers, embeds=False)
    assert outcome.status == status
    assert words in outcome.reason
    assert outcome.shared_fraction == (0.99 if status == "equal" else 0)


def test_tokens_that_hardly_vary_fail() -> None:
    """Three engines that repeat one token prove nothing. Embeddings are compared by their bits alone."""
    same = {role: [{**each, "answer": [[7] * 24]} for each in both] for role, both in _answers().items()}
    assert judge(same, embeds=False).status == "failed"
    assert judge(same, embeds=True).status == "equal"
