"""Operations that write to shared weights are refused before anything changes; the engine goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import status_of

from shared_store.base.errors import UnsupportedError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

WRITING = (
    "rpc reload_weights",
    "rpc init_weight_transfer_engine {}",
    "rpc start_weight_update",
    "rpc update_weights {}",
)


def test_weights_are_not_reloaded(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """Each of vLLM's operations raises the reason and the next step; answers and store do not change."""
    process = engine(checkpoint("llama"), load_format="wooly", extra={"fallback": False}, obey=True)
    process.wait("answered")
    before = process.do("answer")["answers"]
    for command in WRITING:
        error = process.do(command)["error"]
        assert "shared and cannot be reloaded in place" in error
        assert "--load-format auto" in error
    assert process.do("answer")["answers"] == before
    process.tell("stop")
    assert process.finish() == 0
    assert status_of(runtime_dir).counters.fallbacks == 0


def test_private_weights_are_reloaded(engine: Any, checkpoint: Any) -> None:
    """Private weights are reloaded as in stock vLLM, in a process with wooly installed."""
    process = engine(
        checkpoint("llama"), load_format="wooly", environment={"WOOLY_AUTOSTART": "0"}, lease=False, obey=True
    )
    process.wait("answered")
    before = process.do("answer")["answers"]
    assert "cannot be reloaded" not in process.do("rpc reload_weights").get("error", "")
    assert process.do("answer")["answers"] == before
    process.tell("stop")
    assert process.finish() == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"parallel_config": SimpleNamespace(enable_eplb=True)}, "EPLB"),
        ({"weight_transfer_config": SimpleNamespace(backend="nccl")}, "weight transfer"),
    ],
    ids=["eplb", "weight transfer"],
)
def test_refused_before_loading(settings: dict[str, Any], reason: str) -> None:
    """Engines that will write to their weights load them the stock way."""
    pytest.importorskip("vllm")
    from wooly_vllm.loading.identity import check_supported

    plain = {
        "parallel_config": SimpleNamespace(),
        "cache_config": SimpleNamespace(),
        "device_config": SimpleNamespace(device="cpu"),
    }
    model, load = SimpleNamespace(quantization=None), SimpleNamespace(device=None)
    check_supported(SimpleNamespace(**plain), model, load)
    with pytest.raises(UnsupportedError, match=reason):
        check_supported(SimpleNamespace(**(plain | settings)), model, load)
