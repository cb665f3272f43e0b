"""A prefill and a decode engine on one GPU and one copy of the weights, with CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BESIDE_OTHERS
from support.handing_over import decode_goes_on_from_prefill

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_decode_engine_goes_on_from_the_prefill_engines_cache(
    checkpoint: Any, runtime_dir: Path, eager: bool
) -> None:
    """Both share the weights."""
    pytest.importorskip("vllm")
    settings = {**BESIDE_OTHERS, "enforce_eager": eager}
    if not eager:
        settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4]}
    decode_goes_on_from_prefill(checkpoint("qwen3"), runtime_dir, settings)
