"""Short steps of one engine core: prefills in chunks of about 20 ms, while a more important workload computes.

A step that has begun cannot be interrupted, so its length is what the more important workload waits for at most. The
scheduler divides prefills by itself once a step may have fewer tokens. Decoding requests always get theirs.

Relies on ``Scheduler.max_num_scheduled_tokens``, which each call of ``schedule`` reads anew, and on ``running``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

STEP_S: Final = 0.02
"""Seconds that a step should last."""

LEAST: Final = 16
"""Tokens of a chunk at least: of a smaller one, most of the time is the step's fixed cost."""

FIRST: Final = 256
"""Tokens of a step before any prefill was measured."""

_FASTER: Final = 0.5
"""Weight of a step that was faster than those before. A slower one counts at once."""


class ShortSteps:
    """Short steps of one engine core."""

    def __init__(self, engine: Any) -> None:
        """``engine``: vLLM's ``EngineCore``. Steps of one whose prefills must not be divided are never shortened."""
        self._scheduler = engine.scheduler
        self._per_request = 1 + int(getattr(engine.scheduler, "num_spec_tokens", 0) or 0)
        self._divides = _divides_prefills(engine)
        self._token_s = 0.0
        self._decoded = 0

    @property
    def budget(self) -> int:
        """Tokens that a short step may have, for the requests that run now."""
        fits = int(STEP_S / self._token_s) if self._token_s else FIRST
        return max(self._decoded_now() + LEAST, fits)

    def _decoded_now(self) -> int:
        """Return the tokens that running requests get if all of them decode."""
        return len(self._scheduler.running) * self._per_request

    @contextlib.contextmanager
    def applied(self, *, shorten: bool) -> Iterator[None]:
        """Let the scheduler make one batch; a short one, if asked and possible."""
        if not self._divides:
            yield
            return
        self._decoded = self._decoded_now()
        if not shorten:
            yield
            return
        scheduler = self._scheduler
        usual = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = min(usual, self.budget)
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = usual

    def prefills(self, tokens: int) -> bool:
        """Return whether the batch that was made last, of so many tokens, is mostly prefill: its speed is of use."""
        return self._divides and tokens >= max(self._decoded + LEAST, 2 * self._decoded)

    def measure(self, tokens: int, seconds: float) -> None:
        """Learn from a step that was mostly prefill, and ended."""
        slower = seconds / tokens - self._token_s
        self._token_s += slower if slower > 0 else slower * _FASTER


def _divides_prefills(engine: Any) -> bool:
    """Return whether the scheduler may divide prefills at any token.

    It may not divide those with images that one step must have whole, those with states that are kept at block
    boundaries, and those of models that denoise a block of tokens at once.
    """
    scheduler, model = engine.scheduler, engine.vllm_config.model_config
    settings = engine.vllm_config.scheduler_config
    return (
        bool(settings.enable_chunked_prefill)
        and not getattr(settings, "disable_chunked_mm_input", False)
        and isinstance(getattr(scheduler, "max_num_scheduled_tokens", None), int)
        and hasattr(scheduler, "running")
        and not getattr(scheduler, "need_mamba_block_aligned_split", False)
        and not getattr(model, "is_diffusion", False)
    )
