"""Methods of vLLM's workers that move private memory and shared weights off the device and back.

The engine calls them on all its workers by ``collective_rpc``, by name, at a step boundary and with no step in flight.
Arguments and results are plain values. None raises for an expected failure: it returns the reason, so that all workers
answer and the engine can decide for all of them.

A move away, for all workers at once::

    wooly_prepare_leave(blocks)   while steps may still run: host copies of weights exist, memory for copies is there
    wooly_save(block_ids)         no step in flight: copies of private memory; nothing is unmapped
    wooly_leave()                 if every worker saved: unmap everything
    wooly_stay()                  otherwise: drop the copies; everything is in place

and back::

    wooly_create()                map everything; a worker that fails has unmapped what it mapped
    wooly_fill()                  if every worker mapped: copy the contents back
    wooly_roll_back()             otherwise: unmap again; the copies are kept

"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from shared_store.base.errors import UnsupportedError
from wooly_vllm import compat
from wooly_vllm.residency import adapters, ahead, workspaces
from wooly_vllm.residency.kv_cache import Allocating, blocks_of, cache_bytes, check_views
from wooly_vllm.residency.move import Mover
from wooly_vllm.residency.refusals import by_configuration
from wooly_vllm.sharing_loader import sharing_loader


def install() -> None:
    """Give workers of this process these methods, and KV caches of wooly engines memory that can leave. Idempotent."""
    (worker,) = compat.find("vllm.v1.worker.gpu_worker", "Worker")
    if hasattr(worker, wooly_holdings.__name__):
        return
    worker.initialize_from_config = _allocating(worker.initialize_from_config)
    worker.compile_or_warm_up_model = _getting_ready(worker.compile_or_warm_up_model)
    worker.sleep = _discarding(worker.sleep)
    worker.wake_up = _bringing(worker.wake_up)
    for method in METHODS:
        setattr(worker, method.__name__, method)


def wooly_holdings(worker: Any) -> dict[str, Any]:
    """Return the worker's private memory, in bytes.

    Keys: ``device`` (``cpu`` or a GPU's UUID); ``private``: on it now; ``stays``: those that a swap does not free;
    ``needs``: on it when resident; ``shared``: of shared weights that it maps then; ``host_bytes``: host memory for
    copies; ``block_bytes``: of one KV block, in all layers of this worker; ``copy_room``: most bytes that copies of
    blocks may take now; ``refusal``: why this worker cannot leave, or ""; ``shares``: whether its weights are shared.
    """
    return Mover.of(worker).holdings()


def wooly_prepare_leave(worker: Any, blocks: int = 0) -> str:
    """Make host copies of shared weights, and check that copies of ``blocks`` KV blocks fit. Idempotent.

    Steps may run meanwhile. Returns "" or the reason why the worker cannot leave.
    """
    return Mover.of(worker).prepare(blocks)


def wooly_save(worker: Any, block_ids: list[int]) -> str:
    """Copy these KV blocks and the other private memory off the device. Returns "" or a reason; nothing is unmapped.

    No step is in flight. Blocks that are not named are zero when the worker is back.
    """
    return Mover.of(worker).save(block_ids)


def wooly_leave(worker: Any) -> dict[str, Any]:
    """Unmap private memory and shared weights, after :func:`wooly_save` returned "" on every worker.

    Returns ``private`` (bytes left on the device), ``moved`` (bytes copied), ``steps`` (seconds by step) and ``error``:
    "", or why everything is still in place.
    """
    return Mover.of(worker).leave()


def wooly_stay(worker: Any) -> None:
    """Drop copies of :func:`wooly_save` and host copies of :func:`wooly_prepare_leave`. The worker goes on."""
    Mover.of(worker).stay()


def wooly_create(worker: Any) -> str:
    """Map private memory and shared weights, empty where :func:`wooly_fill` has not run.

    Returns "", or the reason why nothing could be mapped: everything that was is unmapped again. Idempotent.
    """
    return Mover.of(worker).create()


def wooly_fill(worker: Any) -> dict[str, Any]:
    """Copy the contents back, after :func:`wooly_create` returned "" on every worker. Steps may run afterwards.

    Returns ``private`` (bytes on the device), ``moved``, ``steps``, and ``lost``: "", or why the copies of KV blocks
    are not usable. All blocks are zero then: the engine drops every prefix and computes its running requests again.
    """
    return Mover.of(worker).fill()


def wooly_roll_back(worker: Any) -> None:
    """Unmap again what :func:`wooly_create` mapped, as another worker could not. The copies are kept. Idempotent."""
    Mover.of(worker).roll_back()


def wooly_unpin(worker: Any) -> str:
    """Unregister the memory of copies from the device, before a driver's checkpoint. Returns "" or a reason."""
    return Mover.of(worker).unpin()


def wooly_pin(worker: Any) -> None:
    """Register it again after a restore."""
    Mover.of(worker).pin()


METHODS = (
    wooly_holdings,
    wooly_prepare_leave,
    wooly_save,
    wooly_leave,
    wooly_stay,
    wooly_create,
    wooly_fill,
    wooly_roll_back,
    wooly_unpin,
    wooly_pin,
)
"""What workers get, under the functions' names."""


def _allocating(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.initialize_from_config``, which allocates the KV cache."""

    @functools.wraps(stock)
    def initialize_from_config(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        if sharing_loader(self.vllm_config) is None:
            return stock(self, kv_cache_config, *args, **kwargs)
        mover = Mover.attach(self, torch.device(self.device))
        mover.refusal = by_configuration(self.vllm_config)
        if mover.refusal:
            mover.count_outside(cache_bytes(kv_cache_config))
            return stock(self, kv_cache_config, *args, **kwargs)
        if self.vllm_config.lora_config is not None and not self.vllm_config.model_config.enable_sleep_mode:
            # With sleep mode adapters are in vLLM's pool, which does not release what they leave there.
            mover.set_others(adapters.move_in(compat.models_of(self), mover.memory))
        workspaces.move_in(mover.memory)
        mover.reclaim()
        with Allocating(mover.memory, kv_cache_config) as allocating:
            result = stock(self, kv_cache_config, *args, **kwargs)
        try:
            blocks = blocks_of(kv_cache_config, allocating.allocated)
            check_views(blocks, _views(self.vllm_config))
            mover.set_blocks(blocks)
        except UnsupportedError as error:
            mover.refusal = str(error)
        return result

    return initialize_from_config


def _getting_ready(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.compile_or_warm_up_model``, the last step of a worker's start."""

    @functools.wraps(stock)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        loader = sharing_loader(self.vllm_config)
        if loader is not None and loader.options.may_be_swapped:
            mover = Mover.of(self)
            mover.get_ready()
            if not mover.refusal:
                ahead.begin(self)
        return result

    return compile_or_warm_up_model


def _views(vllm_config: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors through which layers use the KV cache."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        yield from _tensors(getattr(layer, "kv_cache", None))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for part in value:
            yield from _tensors(part)


def _discarding(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.sleep``, which discards the KV cache: its memory is not in vLLM's pool."""

    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1) -> Any:
        result = stock(self, level)
        Mover.of(self).discard()
        return result

    return sleep


def _bringing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.wake_up``: the KV cache is mapped before vLLM uses it."""

    @functools.wraps(stock)
    def wake_up(self: Any, tags: list[str] | None = None) -> Any:
        if tags is None or "kv_cache" in tags:
            Mover.of(self).bring_empty()
        return stock(self, tags)

    return wake_up
