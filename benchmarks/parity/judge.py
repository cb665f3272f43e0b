"""The outcome of a row, from the answers of its three engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DISTINCT = 10
"""Answers must have more distinct tokens than this: equal answers that hardly vary would prove nothing."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a row.

    Attributes:
        status: ``equal``, ``refused``, ``differs``, ``failed`` or ``stock-failed``.
        reason: Explanation; empty for ``equal``.
        shared_fraction: Fraction (0 to 1) of the reader's weights that it maps from the store.
    """

    status: str
    reason: str = ""
    shared_fraction: float = 0.0


def judge(answers: Mapping[str, list[dict[str, Any]]], *, embeds: bool) -> Outcome:
    """Compare the two answers of publisher and reader with those of stock vLLM, bit by bit."""
    stock, again = (each["answer"] for each in answers["stock"])
    refused = [reason for role in ("publisher", "reader") for reason in answers[role][0]["refused"]]
    for role in ("publisher", "reader"):
        for number, each in enumerate(answers[role]):
            if each["answer"] != (stock, again)[number]:
                unsteady = "" if stock == again else "; but stock vLLM does not answer twice alike either"
                not_shared = f"; not shared: {refused[0]}" if refused else ""
                return Outcome("differs", f"answer {number + 1} of the {role} is not stock's{unsteady}{not_shared}")
    if not embeds and len({token for tokens in stock for token in tokens}) <= DISTINCT:
        return Outcome("failed", "the answers hardly vary, so that they prove nothing")
    if refused:
        return Outcome("refused", refused[0])
    lease = answers["reader"][0]
    if lease["role"] != "reader" or not lease["mapped_bytes"]:
        reported = {name: value for name, value in lease.items() if name in ("role", "mapped_bytes", "store")}
        return Outcome("failed", f"the reader maps nothing, and does not say why: {reported}")
    mapped, private = lease["mapped_bytes"], lease["private_bytes"]
    return Outcome("equal", shared_fraction=round(mapped / (mapped + private), 4))


def brief(error: str) -> str:
    """Return one line of an error that ends with the tail of a log."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    ended = len(lines) > 1 and (" ended with exit code " in lines[0] or " within " in lines[0])
    return f"{lines[0]}: {lines[-1]}" if ended else lines[0]
