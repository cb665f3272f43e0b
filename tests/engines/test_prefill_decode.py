"""A prefill and a decode engine on one copy of the weights, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.handing_over import decode_goes_on_from_prefill

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_decode_engine_goes_on_from_the_prefill_engines_cache(checkpoint: Any, runtime_dir: Path) -> None:
    """And both share the weights."""
    decode_goes_on_from_prefill(checkpoint("qwen3"), runtime_dir, {"enforce_eager": True})
