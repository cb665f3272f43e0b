"""A prefill and a decode engine on one copy of the weights, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines.engine import CPU_KV_BLOCKS
from support.handing_over import decode_goes_on_from_prefill

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_decode_engine_goes_on_from_the_prefill_engines_cache(checkpoint: Any, runtime_dir: Path) -> None:
    """And both share the weights."""
    settings = {"enforce_eager": True, "num_gpu_blocks_override": CPU_KV_BLOCKS}
    decode_goes_on_from_prefill(checkpoint("qwen3"), runtime_dir, settings)
