"""A cap under MPS that can have no effect ends an engine's start, with the next step."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import SHARING

pytestmark = pytest.mark.timeout(590)


def test_an_engine_on_a_cpu_with_a_cap_does_not_start(engine: Any, checkpoint: Any) -> None:
    process = engine(checkpoint("llama"), environment={"WOOLY_MPS_PERCENT": "25"}, **SHARING)
    assert process.finish() != 0
    assert "WOOLY_MPS_PERCENT=25 caps a workload on GPUs, and this one computes on cpu: unset it" in "\n".join(
        process.log
    )
