"""How much memory an engine on a GPU may use beside weights that it shares.

vLLM sizes its KV cache by what the device lost while the engine started: that is right for a process alone on its GPU,
and for the one that publishes. ``--gpu-memory-utilization`` stays what it is for every engine, *the share of the GPU
that it may use, weights included*, whether it brought the weights itself or found them in the store:

* An engine that will attach is charged for what it maps, as vLLM does for weights that another process holds
  (``get_external_weight_memory``, from 0.32 on; before, the same rule is applied here).
* Engines on one GPU start one after the other, by a lease in the store, from the first look at free memory until the
  KV cache and the CUDA graphs are in place. Otherwise one would be charged for what its neighbour allocates meanwhile.
  Ranks that wait for each other take one turn, on all of their GPUs: if each took its own, those of two engines could
  wait in a circle.

Processes that know nothing of the lease can still change free memory while an engine starts, as they can beside stock
vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.torch.devices import store_device
from wooly_vllm import compat
from wooly_vllm.loading.options import Options

if TYPE_CHECKING:
    from wooly_vllm.loading.loader import WoolyLoader  # which asks this module what to charge

_WORKER = "vllm.v1.worker.gpu_worker"
_STARTING = "_wooly_starting"
"""Attribute of a worker that is starting: what ends its turn."""


def install() -> None:
    """Have GPU workers take turns, and charge them for weights that they map. Idempotent."""
    (worker,) = compat.find(_WORKER, "Worker")
    if getattr(worker.init_device, "wooly", False):
        return
    worker.init_device = _within_a_turn(worker.init_device)
    compat.replace_function(_WORKER, "init_worker_distributed_environment", _taking_a_turn)
    worker.compile_or_warm_up_model = _ending_the_turn(worker.compile_or_warm_up_model)
    if not compat.knows_external_weights():
        compat.replace_function(_WORKER, "request_memory", _charged_for_shared)


def external_bytes(vllm_config: Any) -> int:
    """Bytes of an engine's models, its draft model too, that the store has already on this engine's device.

    0 where that cannot be told.
    """
    loader = _loader(vllm_config)
    if loader is None:
        return 0
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    models = [vllm_config.model_config, *([draft] if _is_loaded_apart(vllm_config, draft) else [])]
    return sum(_resident_bytes(loader, vllm_config, model) for model in models)


def _resident_bytes(loader: WoolyLoader, vllm_config: Any, model_config: Any) -> int:
    try:
        return loader.resident_bytes(vllm_config, model_config)
    except WoolyError as error:
        compat.logger().warning("wooly: cannot tell what the store holds of %s: %s", model_config.model, error)
        return 0


def _is_loaded_apart(vllm_config: Any, draft: Any) -> bool:
    """Whether there is a draft model with a checkpoint of its own; n-gram drafts name their target as the model."""
    return draft is not None and draft.model != vllm_config.model_config.model


def charge(external: int, total: int, cache_config: Any) -> int:
    """What of the shared weights an engine is charged for, in bytes, so that its share of the GPU is not used up by it.

    A KV cache of a fixed size (``--kv-cache-memory-bytes``) is not made to fit ``--gpu-memory-utilization``: stock vLLM
    then takes the share only as what must be free at the start, and lets the weights exceed it. So must shared ones.
    """
    if cache_config.kv_cache_memory_bytes is None:
        return external
    return min(external, _requested(total, cache_config) - 1)


def _requested(total: int, cache_config: Any) -> int:
    """The share of a GPU's memory that was asked for, in bytes."""
    share: float = cache_config.gpu_memory_utilization
    return math.ceil(total * share)


def _loader(vllm_config: Any) -> WoolyLoader | None:
    """A configuration's loader, if it shares weights."""
    from wooly_vllm.loading.loader import WoolyLoader

    loader = compat.loader_of(vllm_config)
    return loader if isinstance(loader, WoolyLoader) else None


def _within_a_turn(init_device: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(init_device)
    def wrapper(self: Any) -> Any:
        if self.vllm_config.device_config.device_type == "cuda" and _loader(self.vllm_config) is not None:
            _current.append(self)
        try:
            return init_device(self)
        except BaseException:
            _end_turn(self)
            raise
        finally:
            _current.clear()

    wrapper.wooly = True  # type: ignore[attr-defined]
    return wrapper


_current: list[Any] = []
"""The worker that prepares its device right now."""


def _taking_a_turn(init_distributed: Callable[..., Any]) -> Callable[..., Any]:
    """In the function of vLLM in which ranks meet: a worker knows its GPU then, and has yet to look at its memory."""

    @functools.wraps(init_distributed)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _current and (loader := _loader(_current[0].vllm_config)) is not None:
            setattr(_current[0], _STARTING, _turn(_current[0], loader.options))
        return init_distributed(*args, **kwargs)

    return wrapper


def _turn(worker: Any, options: Options) -> contextlib.ExitStack:
    """Wait for this worker's turn on its GPUs, and on those of the ranks that it speaks for."""
    import torch

    turn = contextlib.ExitStack()
    gpus = spoken_for(worker, torch.cuda.device_count())
    if not gpus:
        return turn
    try:
        session = turn.enter_context(Session.connect(options.runtime_dir, name="vllm, starting"))
        for name in sorted(store_device(compat.gpu_of(rank)) for rank in gpus):
            turn.enter_context(session.lease(f"start:{name}", options.timeout_s))
    except WoolyError as error:
        compat.logger().warning("wooly: this engine starts out of turn, its KV cache may come out wrong: %s", error)
        turn.close()
    return turn


def spoken_for(worker: Any, visible: int) -> range:
    """Local ranks whose GPUs a worker takes a turn on, of those that are ``visible`` to it; none for most workers.

    The first rank of those that wait for each other speaks for all of them. These are the tensor and pipeline parallel
    ranks of an engine; and all data parallel ones of a model with experts (those of other models are independent, and
    vLLM sets their size to 1). GPUs that it does not see, on other nodes or beside it under an external load balancer,
    are left without a turn.
    """
    parallel = worker.vllm_config.parallel_config
    if worker.rank != 0 or (parallel.data_parallel_size > 1 and parallel.data_parallel_rank != 0):
        return range(0)
    engines = parallel.data_parallel_size_local if parallel.data_parallel_size > 1 else 1
    return range(worker.local_rank, min(worker.local_rank + engines * parallel.world_size, visible))


def _ending_the_turn(warm_up: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(warm_up)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return warm_up(self, *args, **kwargs)
        finally:
            _end_turn(self)

    return wrapper


def _end_turn(worker: Any) -> None:
    turn: contextlib.ExitStack | None = worker.__dict__.pop(_STARTING, None)
    if turn is not None:
        try:
            turn.close()
        except WoolyError as error:
            compat.logger().warning("wooly: the store is gone, and with it this engine's turn: %s", error)


def _charged_for_shared(stock: Callable[..., int]) -> Callable[..., int]:
    """The ``request_memory`` of vLLM, with weights in the store counted as part of what is asked for."""

    @functools.wraps(stock)
    def request_memory(init_snapshot: Any, cache_config: Any) -> int:
        found = external_bytes(_current[0].vllm_config) if _current else 0
        if not found:
            return stock(init_snapshot, cache_config)
        requested = _requested(init_snapshot.total_memory, cache_config)
        own = requested - charge(found, init_snapshot.total_memory, cache_config)
        if own <= 0 or init_snapshot.free_memory < own:
            raise ValueError(
                f"--gpu-memory-utilization {cache_config.gpu_memory_utilization} asks for {requested} bytes, of which "
                f"{found} are shared weights that are there already; of the other {max(0, own)}, "
                f"{init_snapshot.free_memory} are free. Change it, or free memory on the GPU."
            )
        return own

    return request_memory
