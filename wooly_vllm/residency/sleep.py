"""vLLM's sleep mode for shared weights: hooks around the sleep and wake of engines and workers.

vLLM offloads a memory pool of its own, which shared weights are not part of. A worker that goes to sleep therefore
first removes its shared models from the device, and maps them again, at the same addresses, before it wakes.

Sleep level 2 discards weights in order to load others in their place. It is refused, as a reload in place is. A worker
refuses on its own; the engine asks its workers before it stops serving, so that a refusal leaves it running.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from shared_store.base.errors import UnsupportedError, WoolyError
from wooly_vllm import compat
from wooly_vllm.residency import shared_models
from wooly_vllm.sharing_loader import sharing_loader

_REFUSAL = "wooly_refusal"
"""A worker's method: prepare to sleep at a level, and return the reason if that is impossible."""

_STAY_AWAKE = "wooly_stay_awake"
"""A worker's method: undo the preparation."""


def install_in_engine() -> None:
    """Make engines of this process ask their workers before they sleep. Idempotent."""
    (core,) = compat.find("vllm.v1.engine.core", "EngineCore")
    if not getattr(core.sleep, "wooly", False):
        core.sleep = _asking(core.sleep)


def install_in_workers() -> None:
    """Make workers of this process put shared models to sleep, and refuse writes to them. Idempotent."""
    (worker,) = compat.find("vllm.v1.worker.gpu_worker", "Worker")
    if getattr(worker, _REFUSAL, None) is not None:
        return
    setattr(worker, _REFUSAL, _refusal)
    setattr(worker, _STAY_AWAKE, _stay_awake)
    worker.sleep = _sleeping(worker.sleep)
    worker.wake_up = _waking(worker.wake_up)
    for name, method in compat.methods_that_write_weights(worker):
        setattr(worker, name, _refused(method))


def _refusal(worker: Any, level: int) -> str:
    """Prepare to sleep at a level; return the reason if that fails, else "". Raises nothing: all workers answer."""
    try:
        _prepare(worker, level)
    except WoolyError as error:
        return f"{error} [{error.code}]"
    except (OSError, RuntimeError) as error:  # of the kernel, or of torch
        return f"{type(error).__name__}: {error}"
    return ""


def _stay_awake(worker: Any) -> None:
    """Release the host copies that were prepared."""
    for sleeper in shared_models.sleepers(worker):
        sleeper.stay_awake()


def _prepare(worker: Any, level: int) -> None:
    if level > 1:
        shared_models.refuse_writes(
            [*shared_models.models_that_sleep(worker), *compat.models_of(worker)],
            "discarded (sleep level 2), only offloaded (sleep level 1)",
        )
    for sleeper in shared_models.sleepers(worker):
        sleeper.prepare()


def _asking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore.sleep`` to ask the workers first."""

    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= 1 and sharing_loader(self.vllm_config) is not None and not self.model_executor.is_sleeping:
            reasons = [reason for reason in self.collective_rpc(_REFUSAL, args=(level,)) if reason]
            if reasons:
                self.collective_rpc(_STAY_AWAKE)
                raise UnsupportedError(f"this engine cannot sleep, and stays awake: {reasons[0]}")
        return stock(self, level, *args, **kwargs)

    sleep.wooly = True  # type: ignore[attr-defined]
    return sleep


def _sleeping(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.sleep``."""

    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1) -> Any:
        try:
            _prepare(self, level)
        except BaseException:
            _stay_awake(self)
            raise
        if not shared_models.sleepers(self):
            return stock(self, level)
        torch.cuda.synchronize()  # no kernel may use memory that is about to be unmapped
        try:
            for sleeper in shared_models.sleepers(self):
                sleeper.sleep()
                compat.logger().info("wooly: unmapped %.1f MiB of shared weights for sleep", sleeper.nbytes / 2**20)
            return stock(self, level)
        except BaseException:
            for sleeper in shared_models.sleepers(self):
                sleeper.wake()
            raise

    return sleep


def _waking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.wake_up``."""

    @functools.wraps(stock)
    def wake_up(self: Any, tags: list[str] | None = None) -> Any:
        if tags is None or "weights" in tags:
            for sleeper in [sleeper for sleeper in shared_models.sleepers(self) if sleeper.asleep]:
                woken = sleeper.wake()
                compat.logger().info(
                    "wooly: mapped weights again, %.1f MiB shared, %.1f MiB private",
                    woken.shared_bytes / 2**20,
                    woken.private_bytes / 2**20,
                )
        return stock(self, tags)

    return wake_up


def _refused(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a worker's method that writes to weights."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared_models.refuse_writes(compat.models_of(self))
        return stock(self, *args, **kwargs)

    return method
