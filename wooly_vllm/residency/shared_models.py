"""The models of this process whose weights are shared, and the sleepers of those in engines that may sleep."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from shared_store.base.errors import UnsupportedError
from shared_store.sleep.sleeper import Sleeper

_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_sleepers: weakref.WeakKeyDictionary[nn.Module, Sleeper] = weakref.WeakKeyDictionary()
"""vLLM has at most one worker that may sleep in a process, so these are that worker's."""


def add(model: nn.Module, sleeper: Sleeper | None = None) -> None:
    """Register a model whose weights must not be written to; with its sleeper if its engine may sleep."""
    _shared.add(model)
    if sleeper is not None:
        _sleepers[model] = sleeper


def models_that_sleep() -> list[nn.Module]:
    """Return the models that have a sleeper."""
    return list(_sleepers)


def sleepers() -> list[Sleeper]:
    """Return the sleepers of all models that have one."""
    return list(_sleepers.values())


def refuse_writes(models: Iterable[nn.Module | None], what: str = "reloaded in place") -> None:
    """Raise :class:`UnsupportedError` if a model's weights are shared. ``what``: completes "cannot be ..."."""
    if any(model in _shared for model in models if model is not None):
        raise UnsupportedError(
            f"these weights are shared and cannot be {what}; to update weights, start the engine with "
            "--load-format auto and without WOOLYAI_WEIGHTS_DEDUP"
        )
