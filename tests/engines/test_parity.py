"""Greedy tokens of publisher and reader equal stock vLLM's, family by family.

vLLM dispatches the layers of the random models, which are small, to the same kernel as wooly, so these are compared
with stock vLLM. SmolLM2's larger layers go to another kernel: it is compared with stock vLLM under wooly's dispatch
(``WOOLY_CPU_DISPATCH=1``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engines import HAS_FINAL_TENSORS, LEFT_OUT, EngineProcess, status_of
from support.models import families

RUN_WITHIN_S = 600.0
"""Time limit of a process that runs all families, one after the other."""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(4 * RUN_WITHIN_S)]

TAUGHT_BY = {
    "qwen3-moe": "experts that are merged with others' names and sizes than Mixtral's",
    "deepseek-v3": "latent attention, whose projections are made of kv_b_proj after loading, and a router with a bias",
    "mamba2": "a state instead of attention: convolutions that are packed, and layers that keep references to tensors",
    "gpt-oss": "sinks, and experts with biases",
    "bert": "an encoder that embeds",
}
"""Families that cover further features, and the features."""

SMALL = [name for name in (*families.COMMON, *TAUGHT_BY) if name not in LEFT_OUT]
FAMILIES = [*SMALL, "smollm2"]
READ_TWICE = ("llama-tied", "gpt2", "bert", "smollm2")
"""Families with a second reader: whether writes reach the store does not depend on the architecture."""
SETTINGS: dict[str, dict[str, Any]] = {"bert": {"runner": "pooling", "skip_tokenizer_init": False}}


def _run(
    runtime_dir: Path, paths: dict[str, Path], environment: dict[str, str], **job: Any
) -> dict[str, dict[str, Any]]:
    settings = [SETTINGS.get(family, {}) for family in paths]
    each = {"models": [str(path) for path in paths.values()], "settings": settings}
    process = EngineProcess(runtime_dir, {**each, **job}, **environment)
    try:
        assert process.finish(RUN_WITHIN_S) == 0, "\n".join(process.log[-40:])
        return {event["model"]: event for event in process.events if event["event"] == "answered"}
    finally:
        process.close()


@pytest.fixture(scope="module")
def runs(module_runtime_dir: Path, checkpoint: Any) -> dict[str, dict[str, Any]]:
    """Return the answers of processes that ran in sequence, by role and by family.

    The publisher and the first reader write to every parameter after they have answered. The second reader starts after
    that, so it would see a write that reached the store.
    """
    paths = {family: checkpoint(family) for family in FAMILIES}
    small, large = ({name: paths[name] for name in names} for names in (SMALL, ["smollm2"]))
    sharing = {"load_format": "wooly", "extra": {"fallback": False}, "scribble": True}
    answers = {
        "stock": _run(module_runtime_dir, small, {}) | _run(module_runtime_dir, large, {"WOOLY_CPU_DISPATCH": "1"}),
        "publisher": _run(module_runtime_dir, paths, {}, **sharing),
        "reader": _run(module_runtime_dir, paths, {}, **sharing),
        "second reader": _run(module_runtime_dir, {name: paths[name] for name in READ_TWICE}, {}, **sharing),
    }
    return {
        role: {family: run[str(path)] for family, path in paths.items() if str(path) in run}
        for role, run in answers.items()
    }


@pytest.mark.parametrize("role", ["publisher", "reader"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock(runs: Any, family: str, role: str) -> None:
    """Shared weights compute the same tokens."""
    assert runs[role][family]["tokens"] == runs["stock"][family]["tokens"]


@pytest.mark.parametrize("family", READ_TWICE)
def test_tokens_equal_stock_after_others_wrote_to_their_copies(runs: Any, family: str) -> None:
    """A later reader maps the published bytes."""
    assert runs["second reader"][family]["tokens"] == runs["stock"][family]["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_not_degenerate(runs: Any, family: str) -> None:
    """Control: the answers vary, so their equality means something."""
    assert len({token for answer in runs["stock"][family]["tokens"] for token in answer}) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_both_map_nearly_all_of_the_weights(runs: Any, family: str) -> None:
    """Less than a tenth of the model is private to publisher and reader (SmolLM2: a thousandth)."""
    for role in ("publisher", "reader"):
        lease = runs[role][family]
        assert lease["role"] == "reader"
        assert lease["private_bytes"] < lease["mapped_bytes"] * (0.001 if family == "smollm2" else 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engines_own_writes_take_effect_for_itself(runs: Any, family: str) -> None:
    """Control: the process that wrote to its parameters answers differently."""
    assert runs["reader"][family]["scribbled"] > 0
    assert runs["reader"][family]["tokens_after"] != runs["reader"][family]["tokens"]


@pytest.mark.usefixtures("runs")
def test_each_model_was_published_once(module_runtime_dir: Path) -> None:
    """Publisher and readers attached to each model; none fell back."""
    counters = status_of(module_runtime_dir).counters
    attached = 2 * len(FAMILIES) + len(READ_TWICE)
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (len(FAMILIES), attached, 0)


@pytest.mark.skipif(HAS_FINAL_TENSORS, reason="this vLLM has a way to mark experts as packed")
def test_experts_that_would_be_packed_twice_are_loaded_the_stock_way(
    engine: Any, checkpoint: Any, runtime_dir: Path
) -> None:
    """A reader cannot use them: it says why, and answers as stock does."""
    path = checkpoint("mixtral")
    stock = engine(path)
    assert stock.finish() == 0, stock.log[-20:]
    process = engine(path, path, load_format="wooly")
    assert process.finish() == 0, process.log[-20:]
    assert status_of(runtime_dir).counters.fallbacks >= 1
    assert any("is loaded the stock way, and not shared: model.layers.0." in line for line in process.log)
    answers = [event["tokens"] for event in process.events if event["event"] == "answered"]
    assert answers == [stock.wait("answered")["tokens"]] * 2
