"""The memory that an engine on a GPU may use beside weights that it shares.

vLLM sizes its KV cache by the memory that the device lost while the engine started. That is right for a process alone
on its GPU, and for a publisher. ``--gpu-memory-utilization`` keeps its meaning for every engine, the fraction of the
GPU that it may use *including weights*, whether it loaded the weights itself or attached to them:

* An engine that will attach is charged for the bytes that it maps, as vLLM does for weights of another process
  (``get_external_weight_memory``, from 0.32 on; for earlier versions the same rule is applied here).
* Engines on one GPU start one after the other, in a turn of the store, from the first look at free memory until the KV
  cache and the CUDA graphs exist. Otherwise an engine would be charged for memory that its neighbour allocates
  meanwhile. Ranks that wait for each other take one turn, on all of their GPUs: with a turn for each rank, those of two
  engines could deadlock.

* What other workloads take and give on the GPU meanwhile is left out of the measurements (:mod:`.others`).

Processes without wooly can still change free memory while an engine starts, as they can with stock vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from shared_store.base import envs
from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.torch.devices import store_device
from wooly_vllm import compat
from wooly_vllm.memory.others import Others, corrected
from wooly_vllm.options import Options
from wooly_vllm.sharing_loader import SharingLoader, sharing_loader

_WORKER = "vllm.v1.worker.gpu_worker"
_STARTING = "_wooly_starting"
"""Attribute of a worker that is starting: the turn, an ``ExitStack``."""


def install() -> None:
    """Make GPU workers take turns, and charge them for weights that they map. Idempotent."""
    (worker,) = compat.find(_WORKER, "Worker")
    if getattr(worker.init_device, "wooly", False):
        return
    worker.init_device = _within_a_turn(worker.init_device)
    compat.replace_function(_WORKER, "init_worker_distributed_environment", _taking_a_turn)
    worker.compile_or_warm_up_model = _ending_the_turn(worker.compile_or_warm_up_model)
    if not compat.knows_external_weights():
        compat.replace_function(_WORKER, "request_memory", _charged_for_shared)
    (snapshot,) = compat.find("vllm.utils.mem_utils", "MemorySnapshot")
    snapshot.measure = corrected(snapshot.measure, _others)


def charged_bytes(vllm_config: Any) -> int:
    """Return the bytes of shared weights that an engine is charged for; 0 on a CPU."""
    device = compat.device_of(vllm_config)
    if device.type != "cuda":
        return 0
    total = torch.cuda.mem_get_info(device)[1]
    return charge(external_bytes(vllm_config), total, vllm_config.cache_config)


def external_bytes(vllm_config: Any, *, in_use: bool = False) -> int:
    """Return the bytes of an engine's models, with its draft model, that the store has on the engine's device.

    0 for a model whose bytes cannot be determined, with a warning. ``in_use``: only those that stay there, see
    :meth:`~wooly_vllm.sharing_loader.SharingLoader.resident_bytes`.
    """
    loader = sharing_loader(vllm_config)
    if loader is None:
        return 0
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    models = [vllm_config.model_config, *([draft] if _has_own_checkpoint(vllm_config, draft) else [])]
    return sum(_resident_bytes(loader, vllm_config, model, in_use=in_use) for model in models)


def _resident_bytes(loader: SharingLoader, vllm_config: Any, model_config: Any, *, in_use: bool) -> int:
    try:
        return loader.resident_bytes(vllm_config, model_config, in_use=in_use)
    except WoolyError as error:
        compat.logger().warning(
            "wooly: cannot determine the shared bytes of %s, the size of the KV cache may be wrong: %s",
            model_config.model,
            error,
        )
        return 0


def _has_own_checkpoint(vllm_config: Any, draft: Any) -> bool:
    """Return True for a draft model with its own checkpoint; n-gram drafts name the target's."""
    return draft is not None and draft.model != vllm_config.model_config.model


def charge(external: int, total: int, cache_config: Any) -> int:
    """Return the part of ``external`` shared bytes that an engine is charged for.

    It is all of them, unless the KV cache has a fixed size (``--kv-cache-memory-bytes``). Stock vLLM then only requires
    the fraction ``--gpu-memory-utilization`` to be free at the start, and lets weights exceed it; so may shared ones.

    Args:
        external: bytes of shared weights on the device.
        total: bytes of the device.
        cache_config: vLLM's.
    """
    if cache_config.kv_cache_memory_bytes is None:
        return external
    return min(external, _requested(total, cache_config) - 1)


def _requested(total: int, cache_config: Any) -> int:
    """Return ``--gpu-memory-utilization`` in bytes."""
    share: float = cache_config.gpu_memory_utilization
    return math.ceil(total * share)


def _within_a_turn(init_device: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap ``Worker.init_device``: note the worker for the hooks below, and end its turn if it fails."""

    @functools.wraps(init_device)
    def wrapper(self: Any) -> Any:
        if self.vllm_config.device_config.device_type == "cuda" and sharing_loader(self.vllm_config) is not None:
            _current.append(self)
        try:
            return init_device(self)
        except BaseException:
            _end_turn(self)
            raise
        finally:
            _current.clear()

    wrapper.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    return wrapper


_current: list[Any] = []
"""The worker whose ``init_device`` is running, or nothing."""


def _taking_a_turn(init_distributed: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function in which ranks meet: a worker has chosen its GPU by then, and not measured its memory."""

    @functools.wraps(init_distributed)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not _current or (loader := sharing_loader(_current[0].vllm_config)) is None:
            return init_distributed(*args, **kwargs)
        turn = _turn(_current[0], loader.options)
        setattr(_current[0], _STARTING, turn)
        result = init_distributed(*args, **kwargs)
        _compare_from_here_on(_current[0], loader.options, turn)
        return result

    return wrapper


def _turn(worker: Any, options: Options) -> contextlib.ExitStack:
    """Wait for the turns on the GPUs that :func:`spoken_for` names, in one order for all engines."""
    turn = contextlib.ExitStack()
    gpus = spoken_for(worker, torch.cuda.device_count())
    if not gpus:
        return turn
    try:
        session = turn.enter_context(
            Session.connect(options.runtime_dir, name="vllm, starting", kind="vllm", workload=options.workload_settings)
        )
        for name in sorted(store_device(compat.gpu_of(rank)) for rank in gpus):
            turn.enter_context(session.turn(f"start:{name}", options.timeout_s))
    except WoolyError as error:
        compat.logger().warning(
            "wooly: this engine starts without a turn, the size of its KV cache may be wrong: %s", error
        )
        turn.close()
    return turn


def _compare_from_here_on(worker: Any, options: Options, starting: contextlib.ExitStack) -> None:
    """Leave out of measurements what other workloads take and give on the worker's GPU, until it has started."""
    member_of = envs.MEMBER_OF.get()
    if not member_of or not compat.swaps_on_gpus():
        return
    try:
        session = Session.connect(options.runtime_dir, name="vllm, starting", kind="vllm", autostart=False)
    except WoolyError as error:
        compat.logger().warning("wooly: what others take while this engine starts is not known: %s", error)
        return
    starting.enter_context(session)
    device = store_device(torch.device("cuda", torch.cuda.current_device()))
    _compared.append(Others(session, device, member_of, external_bytes(worker.vllm_config)))
    starting.callback(_compared.clear)


_compared: list[Others] = []
"""The memory of others on the GPU of the worker that is starting, or nothing."""


def _others() -> Others | None:
    return _compared[0] if _compared else None


def spoken_for(worker: Any, visible: int) -> range:
    """Return the local ranks whose GPUs a worker takes turns on; empty for most workers.

    The first of several ranks that wait for each other takes the turns of all. These are the tensor and pipeline
    parallel ranks of an engine, and all data parallel ranks of a model with experts (those of other models are
    independent: vLLM sets their size to 1). GPUs that the worker does not see, on other nodes or assigned to another
    process by an external load balancer, get no turn.

    Args:
        worker: vLLM's GPU worker.
        visible: number of GPUs that its process sees.
    """
    parallel = worker.vllm_config.parallel_config
    if worker.rank != 0 or (parallel.data_parallel_size > 1 and parallel.data_parallel_rank != 0):
        return range(0)
    engines = parallel.data_parallel_size_local if parallel.data_parallel_size > 1 else 1
    return range(worker.local_rank, min(worker.local_rank + engines * parallel.world_size, visible))


def _ending_the_turn(warm_up: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Worker.compile_or_warm_up_model``, the last step that measures memory."""

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
            compat.logger().warning(
                "wooly: lost the connection to the store, and this engine's turn with it: %s", error
            )


def _charged_for_shared(stock: Callable[..., int]) -> Callable[..., int]:
    """Wrap vLLM's ``request_memory`` to count shared weights as part of the requested bytes."""

    @functools.wraps(stock)
    def request_memory(init_snapshot: Any, cache_config: Any) -> int:
        found = external_bytes(_current[0].vllm_config) if _current else 0
        if not found:
            return stock(init_snapshot, cache_config)
        requested = _requested(init_snapshot.total_memory, cache_config)
        own = requested - charge(found, init_snapshot.total_memory, cache_config)
        if own <= 0 or init_snapshot.free_memory < own:
            raise ValueError(
                f"--gpu-memory-utilization {cache_config.gpu_memory_utilization} requests {requested} bytes; "
                f"{found} are shared weights in the store, and of the other {max(0, own)} only "
                f"{init_snapshot.free_memory} are free. Raise it if it is below the weights, or free memory on the GPU."
            )
        return own

    return request_memory
