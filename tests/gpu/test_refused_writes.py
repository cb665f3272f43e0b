"""A model writes to its shared weights on a GPU: its engine ends with a pointer to the documentation; others go on."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import SHARING

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

EAGER: dict[str, Any] = {"enforce_eager": True, "gpu_memory_utilization": 0.15}


@pytest.mark.usefixtures("vram_returned")
def test_an_engine_whose_model_writes_ends_with_a_pointer_and_others_go_on(engine: Any, checkpoint: Any) -> None:
    """Wooly's note on the illegal access is in the traceback, and once in vLLM's log."""
    pytest.importorskip("vllm")
    path = checkpoint("llama")
    staying = engine(path, settings=EAGER, hold=True, **SHARING)
    before = staying.wait("answered")["tokens"]
    writer = engine(path, settings=EAGER, writes=True, **SHARING)
    assert writer.wait("answered")["tokens"] == before
    assert writer.finish() != 0
    assert not [event for event in writer.events if event["event"] == "answered after a write"]
    log = "\n".join(writer.log)
    assert "illegal memory access" in log
    assert log.count("shared weights are read-only on a GPU") >= 2
    assert any("ERROR" in line and "docs/shared-memory.md#writes" in line for line in writer.log)
    staying.tell("go on")
    assert staying.wait("answered again")["tokens"] == before
    assert staying.finish() == 0
