"""An engine in the caller's process leaves its devices between steps, and returns when it has work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, EngineProcess
from support.gating import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


class Gated(EngineProcess):
    """An engine that obeys commands of :mod:`support.gating`."""

    def gate(self, command: str, **given: Any) -> dict[str, Any]:
        """Run a command."""
        found = self.do(f"gate {command} {json.dumps(given, separators=(',', ':'))}")
        assert "error" not in found, found
        return found


@pytest.fixture(scope="module", params=["synchronous", "asynchronous"])
def engine(request: Any, module_runtime_dir: Path, checkpoint: Any) -> Iterator[Gated]:
    """An engine with KV blocks of 32 tokens."""
    settings = {"async_scheduling": request.param == "asynchronous", "block_size": 32}
    job = {"models": [str(checkpoint("llama"))], **SHARING, "settings": settings, "obey": True}
    process = Gated(module_runtime_dir, job)
    try:
        process.wait("answered")
        yield process
        process.tell("stop")
        assert process.finish() == 0
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(engine: Gated) -> dict[str, list[int]]:
    """The tokens of all prompts in one batch."""
    found = engine.gate("answer")["tokens"]
    assert engine.gate("answer")["tokens"] == found
    assert len(found) == len(PROMPTS)
    tokens: dict[str, list[int]] = found
    return tokens


def test_an_engine_joins_its_store_with_its_memory(engine: Gated) -> None:
    facts = engine.gate("facts")
    assert (facts["state"], facts["away"], facts["sleeping"]) == ("resident", False, False)
    assert facts["private"] == facts["needs"]
    assert facts["private"]["cpu"] > facts["stays"]["cpu"]


def test_requests_that_run_are_swapped_at_step_boundaries_and_end_with_the_same_tokens(
    engine: Gated, undisturbed: dict[str, list[int]]
) -> None:
    found = engine.gate("answer", swaps=[3, 11, 30])
    assert found["tokens"] == undisturbed
    assert len(found["said"]) == 3
    assert set(found["said"]) <= {"swapped", "returning", "resident"}


def test_requests_differ_if_nothing_is_restored(engine: Gated, undisturbed: dict[str, list[int]]) -> None:
    """A control: the requests do read the blocks that a swap restores."""
    assert engine.gate("answer", swaps=[11], restore=False)["tokens"] != undisturbed


def test_a_request_at_a_swapped_engine_brings_it_back(engine: Gated, undisturbed: dict[str, list[int]]) -> None:
    engine.gate("answer")
    assert engine.gate("leave")["said"] == ["swapped"]
    away = engine.gate("facts")
    assert (away["state"], away["away"], away["sleeping"]) == ("swapped", True, False)
    assert away["private"] == away["stays"]
    assert engine.gate("answer")["tokens"] == undisturbed
    assert engine.gate("facts")["state"] == "resident"


def test_cached_prefixes_survive_a_swap(engine: Gated, undisturbed: dict[str, list[int]]) -> None:
    engine.gate("answer")
    hits = engine.gate("answer", fresh=False)
    engine.gate("leave")
    after = engine.gate("answer", fresh=False)
    assert after["cached"] == hits["cached"]
    assert any(after["cached"].values())
    assert after["tokens"] == hits["tokens"]
    assert engine.gate("answer")["tokens"] == undisturbed


def test_a_request_that_is_aborted_while_the_engine_is_away_is_gone(
    engine: Gated, undisturbed: dict[str, list[int]]
) -> None:
    engine.gate("leave")
    assert engine.gate("queue_and_abort")["each"] == [[0, 0], [0, 1], [0, 0]]
    assert engine.gate("answer")["tokens"] == undisturbed
    found = engine.gate("answer", swaps=[5], abort=2)["tokens"]
    assert {name: found[name] for name in ("2", "3")} == {name: undisturbed[name] for name in ("2", "3")}
    assert engine.gate("facts")["counts"] == [0, 0]


def test_a_swapped_engine_resets_its_prefix_cache_and_stays_away(
    engine: Gated, undisturbed: dict[str, list[int]]
) -> None:
    engine.gate("answer")
    engine.gate("leave")
    found = engine.gate("reset")
    assert (found["reset"], found["state"]) == (True, "swapped")
    again = engine.gate("answer", fresh=False)
    assert not any(again["cached"].values())
    assert again["tokens"] == undisturbed


def test_a_call_that_needs_the_devices_brings_a_swapped_engine_back(engine: Gated) -> None:
    engine.gate("leave")
    assert engine.gate("rpc", method="get_kv_cache_spec")["workers"] == 1
    assert engine.gate("facts")["state"] == "resident"


def test_a_paused_engine_is_swapped_as_it_is(engine: Gated, undisturbed: dict[str, list[int]]) -> None:
    found = engine.gate("pause_around_a_swap")
    assert found["paused"] == [True, True, True]
    assert found["state"] == "swapped"
    assert engine.gate("resume")["tokens"] == undisturbed


def test_an_engine_with_requests_leaves_only_if_it_may_be_active(engine: Gated) -> None:
    assert "it has requests" in engine.gate("decline")["declined"]
    assert engine.gate("facts")["state"] == "resident"


def test_an_engine_whose_contents_are_lost_computes_nothing_any_more(engine: Gated) -> None:
    """The last test of the engine: it ends."""
    found = engine.gate("fail_to_return")
    assert len(found["errors"]) == 2
    assert "contents are lost" in found["errors"][-1]
    assert found["away"]
