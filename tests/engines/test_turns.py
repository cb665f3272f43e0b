"""An engine in the caller's process waits for its turn before a step, and does everything else meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, EngineProcess
from support.gating import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


class Held(EngineProcess):
    """An engine that obeys commands of :mod:`support.turning`."""

    def turn(self, command: str, **given: Any) -> dict[str, Any]:
        """Run a command."""
        found = self.do(f"turn {command} {json.dumps(given, separators=(',', ':'))}")
        assert "error" not in found, found
        return found


@pytest.fixture(scope="module", params=["synchronous", "asynchronous"])
def engine(request: Any, module_runtime_dir: Path, checkpoint: Any) -> Iterator[Held]:
    settings = {
        "async_scheduling": request.param == "asynchronous",
        "block_size": 32,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
    }
    job = {"models": [str(checkpoint("llama"))], **SHARING, "settings": settings, "obey": True}
    process = Held(module_runtime_dir, job)
    try:
        process.wait("answered")
        yield process
        process.tell("stop")
        assert process.finish() == 0
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(engine: Held) -> dict[str, list[int]]:
    """The tokens of all prompts in one batch, of an engine that was never held."""
    found = engine.turn("answer_in_turns")
    assert len(found["tokens"]) == len(PROMPTS)
    assert found["held"] == []
    steps = found["left"].pop("steps")
    assert steps[0] == steps[1] > 0
    assert found["left"] == {"working": False, "in_flight": 0}
    tokens: dict[str, list[int]] = found["tokens"]
    return tokens


def test_steps_stop_while_an_engine_is_held_and_go_on_with_the_same_tokens(
    engine: Held, undisturbed: dict[str, list[int]]
) -> None:
    found = engine.turn("answer_in_turns", holds=[1, 5, 20])
    assert found["tokens"] == undisturbed
    assert len(found["held"]) == 3
    assert {it["begun"] for it in found["held"]} == {0}
    assert all(it["working"] and sum(it["counts"]) == len(PROMPTS) for it in found["held"])
    assert (found["left"]["working"], found["left"]["in_flight"]) == (False, 0)


def test_a_held_engine_makes_the_one_step_that_it_is_let_make(engine: Held, undisturbed: dict[str, list[int]]) -> None:
    found = engine.turn("answer_in_turns", holds=[7], one_step=True)
    assert [it["begun"] for it in found["held"]] == [1]
    assert found["tokens"] == undisturbed


def test_a_request_is_aborted_while_an_engine_is_held(engine: Held, undisturbed: dict[str, list[int]]) -> None:
    found = engine.turn("answer_in_turns", holds=[7], abort=2)
    assert [(it["begun"], sum(it["counts"])) for it in found["held"]] == [(0, 2)]
    assert found["tokens"] == {name: undisturbed[name] for name in ("2", "3")} | {
        name: tokens for name, tokens in found["tokens"].items() if name in ("0", "1")
    }
    assert found["left"]["working"] is False


def test_an_engine_whose_requests_are_all_aborted_waits_for_nothing(engine: Held) -> None:
    found = engine.turn("answer_in_turns", holds=[7], abort=4)
    assert [(it["begun"], it["counts"]) for it in found["held"]] == [(0, [0, 0])]
    assert (found["left"]["working"], found["left"]["in_flight"]) == (False, 0)


def test_a_held_engine_leaves_its_devices_and_is_held_when_it_is_back(
    engine: Held, undisturbed: dict[str, list[int]]
) -> None:
    found = engine.turn("answer_in_turns", holds=[7], swap=True)
    assert found["tokens"] == undisturbed
    assert [it["begun"] for it in found["held"]] == [0]
    assert set(found["said"]) <= {"swapped", "returning", "resident"}


def test_a_held_engine_goes_on_without_an_arbiter(engine: Held, undisturbed: dict[str, list[int]]) -> None:
    found = engine.turn("answer_in_turns", holds=[7], die=True)
    assert [it["begun"] for it in found["held"]] == [0]
    assert found["tokens"] == undisturbed


def test_prefills_are_divided_while_a_more_important_workload_works(engine: Held) -> None:
    """A step of 450 tokens takes 90 ms here. A machine that is slow otherwise makes chunks shorter only."""
    found = engine.turn("prefill", tokens=450, ms_per_token=0.2)
    steps = found["steps"]
    assert steps["usual"][0] == steps["after"][0] == [450]
    chunks = [size for (size,) in steps["short"]]
    assert max(chunks) <= 120
    assert sum(chunks) == sum(size for (size,) in steps["usual"])
    assert found["budget"] == 512
    assert found["tokens"]["usual"] == found["tokens"]["after"]


def test_requests_decode_in_each_short_step(engine: Held) -> None:
    """A step of 5 tokens would take 20 ms here."""
    steps = engine.turn("prefill", tokens=100, ms_per_token=4, decoding=3)["steps"]
    assert steps["usual"][0] == [1, 1, 1, 100]
    prefills = [step for step in steps["short"] if step[-1] > 1]
    assert len(prefills) > 4
    assert all(step[:-1] == [1, 1, 1] for step in prefills)
