"""Speculative decoding on a GPU: target and draft are both shared, and the tokens are stock vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BESIDE_OTHERS
from support.drafts import eagle_head
from support.engines import SHARING, status_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
@pytest.mark.usefixtures("gpu")
def test_target_and_draft_are_shared(
    engine: Any, checkpoint: Any, tmp_path: Path, runtime_dir: Path, method: str
) -> None:
    """Publisher and reader answer as stock vLLM with the same draft does; every model is resident once."""
    pytest.importorskip("vllm")
    target = checkpoint("llama")
    drafts = {
        "ngram": {"prompt_lookup_max": 3},
        "draft_model": {"model": str(checkpoint("llama-tied"))},
        "eagle": {"model": str(eagle_head(target, tmp_path / "eagle"))},
    }
    speculative = {"method": method, "num_speculative_tokens": 2, **drafts[method]}
    settings = {**BESIDE_OTHERS, "speculative_config": speculative}
    stock = engine(target, settings=settings, gate=True)
    sharing = [engine(target, settings=settings, gate=True, hold=True, **SHARING) for _ in range(2)]
    stock.tell("start")
    right = stock.wait("answered")["tokens"]
    assert stock.finish() == 0
    for process in sharing:
        process.tell("start")
        assert process.wait("answered")["tokens"] == right
    status = status_of(runtime_dir)
    assert [model.readers for model in status.models] == [2] * (1 if method == "ngram" else 2)
    models = len(status.models)
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (models, 2 * models, 0)
    for process in sharing:
        process.tell("go on")
        assert process.wait("answered again")["tokens"] == right
        assert process.finish() == 0
