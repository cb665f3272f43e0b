"""The models of this process whose weights are shared, and their sleepers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from shared_store.base.errors import UnsupportedError
from shared_store.sleep.sleeper import Sleeper
from wooly_vllm import compat

_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_sleepers: weakref.WeakKeyDictionary[nn.Module, Sleeper] = weakref.WeakKeyDictionary()


def add(model: nn.Module, sleeper: Sleeper | None = None) -> None:
    """Register a model whose weights must not be written to, with its sleeper."""
    _shared.add(model)
    if sleeper is not None:
        _sleepers[model] = sleeper


def sleepers(worker: Any = None) -> list[Sleeper]:
    """Return the sleepers of the models of a worker; None: of all models of this process.

    A process has several workers if a program makes several engines in it. What the worker has may be a wrapper, or a
    part, of what was loaded.
    """
    return [_sleepers[model] for model in models_that_sleep(worker)]


def models_that_sleep(worker: Any = None) -> list[nn.Module]:
    """Return the models that :func:`sleepers` returns the sleepers of."""
    if worker is None:
        return list(_sleepers)
    parts = {part for model in compat.models_of(worker) for part in model.modules()}
    return [model for model in _sleepers if not parts.isdisjoint(model.modules())]


def refuse_writes(models: Iterable[nn.Module | None], what: str = "reloaded in place") -> None:
    """Raise :class:`UnsupportedError` if a model's weights are shared. ``what``: completes "cannot be ..."."""
    if any(model in _shared for model in models if model is not None):
        raise UnsupportedError(
            f"these weights are shared and cannot be {what}; to update weights, start the engine with "
            "--load-format auto and without WOOLYAI_WEIGHTS_DEDUP"
        )
