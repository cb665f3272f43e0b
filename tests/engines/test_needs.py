"""The bytes that a start takes are not below those of the engine, before vLLM has chosen all its settings."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCKS = 100
TOKEN_BYTES = 2 * 2 * 4 * 32 * 2
"""Of a model with two layers of four heads: key and value of 32 elements each, in bfloat16."""


@pytest.mark.parametrize(
    ("given", "said", "latent", "tokens"),
    [
        pytest.param({}, 16, False, 128, id="chosen after the model is loaded"),
        pytest.param({}, 128, False, 128, id="chosen before"),
        pytest.param({}, 16, True, 8, id="latent"),  # it has no values beside the keys
        pytest.param({"block_size": 16}, 16, False, 16, id="given, the default"),
        pytest.param({"block_size": 32}, 32, False, 32, id="given"),
    ],
)
def test_bytes_of_a_kv_cache_before_the_model_is_loaded(
    given: dict[str, int], said: int, latent: bool, tokens: int
) -> None:
    """In vLLM 0.33 the size of a block is chosen afterwards; its configuration says 16 tokens until then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        from vllm.config import CacheConfig

        from wooly_vllm.residency import needs
    cache = CacheConfig(**given, num_gpu_blocks_override=BLOCKS)
    cache.block_size = said
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        use_mla=latent,
        get_num_kv_heads=lambda _: 4,
        get_head_size=lambda: 32,
        get_num_layers=lambda _: 2,
    )
    config: Any = SimpleNamespace(model_config=model, cache_config=cache, parallel_config=None)
    assert needs.kv_bytes_on_cpu(config) == BLOCKS * tokens * TOKEN_BYTES
