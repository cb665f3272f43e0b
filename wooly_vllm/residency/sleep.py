"""Sleeping and waking of engines whose weights are shared; and refusals of what would write to such weights.

vLLM's sleep mode frees what lies in a memory pool of its own, which shared weights do not. So a worker that falls
asleep first has its shared models leave the device, and before it wakes up they come back, to the same addresses.

Sleep level 2 throws weights away, to load others in their place: that is refused, as reloading is. A worker refuses by
itself; the engine asks its workers before it stops answering, so that one that may not sleep goes on as it was.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import UnsupportedError, WoolyError
from shared_store.sleep.sleeper import Sleeper
from wooly_vllm import compat

_sleepers: weakref.WeakKeyDictionary[nn.Module, Sleeper] = weakref.WeakKeyDictionary()
"""Shared models of this process's worker, if its engine may sleep. vLLM has one such worker in a process."""

_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models of this process whose weights lie in the store."""

_REFUSAL = "wooly_refusal"
"""A worker's method: why it may not sleep at a level, or nothing."""

_STAY_AWAKE = "wooly_stay_awake"


def share(model: nn.Module, sleeper: Sleeper | None = None) -> None:
    """A model's weights are shared, and not to be written to. ``sleeper``: in an engine that may sleep."""
    _shared.add(model)
    if sleeper is not None:
        _sleepers[model] = sleeper


def refuse_shared(models: Iterable[nn.Module | None], what: str = "reloaded in place") -> None:
    """Raise :class:`UnsupportedError` if weights of one of the models must not be written to."""
    if any(model in _shared for model in models if model is not None):
        raise UnsupportedError(
            f"these weights are shared and cannot be {what}; to update weights, start the engine with "
            "--load-format auto and without WOOLYAI_WEIGHTS_DEDUP"
        )


def install_in_engine() -> None:
    """Have engines of this process ask their workers before they sleep. Idempotent."""
    (core,) = compat.find("vllm.v1.engine.core", "EngineCore")
    if not getattr(core.sleep, "wooly", False):
        core.sleep = _asking(core.sleep)


def install_in_workers() -> None:
    """Have workers of this process look after shared models. Idempotent."""
    (worker,) = compat.find("vllm.v1.worker.gpu_worker", "Worker")
    if getattr(worker, _REFUSAL, None) is not None:
        return
    setattr(worker, _REFUSAL, _refusal)
    setattr(worker, _STAY_AWAKE, _stay_awake)
    worker.sleep = _sleeping(worker.sleep)
    worker.wake_up = _waking(worker.wake_up)
    for name, method in compat.what_writes_weights(worker):
        setattr(worker, name, _refused(method))


def _refusal(worker: Any, level: int) -> str:
    """Prepare to sleep at a level; why that cannot be, or nothing. Does not raise that: other workers answer too."""
    try:
        _prepare(worker, level)
    except WoolyError as error:
        return f"{error} [{error.code}]"
    except (OSError, RuntimeError) as error:  # the kernel's, torch's
        return f"{type(error).__name__}: {error}"
    return ""


def _stay_awake(_worker: Any) -> None:
    """What was prepared is not needed."""
    for sleeper in list(_sleepers.values()):
        sleeper.stay_awake()


def _prepare(worker: Any, level: int) -> None:
    if level > 1:
        refuse_shared([*_sleepers, *compat.models_of(worker)], "thrown away (sleep level 2), only set aside (level 1)")
    for sleeper in list(_sleepers.values()):
        sleeper.prepare()


def _may_share(vllm_config: Any) -> bool:
    from wooly_vllm.loading.loader import WoolyLoader  # which imports this module

    return isinstance(compat.loader_of(vllm_config), WoolyLoader)


def _asking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.sleep``, with the workers asked first."""

    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= 1 and _may_share(self.vllm_config) and not self.model_executor.is_sleeping:
            reasons = [reason for reason in self.collective_rpc(_REFUSAL, args=(level,)) if reason]
            if reasons:
                self.collective_rpc(_STAY_AWAKE)
                raise UnsupportedError(f"this engine cannot sleep, and goes on: {reasons[0]}")
        return stock(self, level, *args, **kwargs)

    sleep.wooly = True  # type: ignore[attr-defined]
    return sleep


def _sleeping(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1) -> Any:
        try:
            _prepare(self, level)
        except BaseException:
            _stay_awake(self)
            raise
        if not _sleepers:
            return stock(self, level)
        torch.cuda.synchronize()  # nothing may use what is unmapped
        try:
            for sleeper in list(_sleepers.values()):
                sleeper.sleep()
                compat.logger().info("wooly: %.1f MiB of shared weights left this engine", sleeper.nbytes / 2**20)
            return stock(self, level)
        except BaseException:
            for sleeper in list(_sleepers.values()):
                sleeper.wake()
            raise

    return sleep


def _waking(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def wake_up(self: Any, tags: list[str] | None = None) -> Any:
        if tags is None or "weights" in tags:
            for sleeper in [sleeper for sleeper in _sleepers.values() if sleeper.asleep]:
                woken = sleeper.wake()
                compat.logger().info(
                    "wooly: weights are back, %.1f MiB shared, %.1f MiB private",
                    woken.shared_bytes / 2**20,
                    woken.private_bytes / 2**20,
                )
        return stock(self, tags)

    return wake_up


def _refused(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_shared(compat.models_of(self))
        return stock(self, *args, **kwargs)

    return method
