"""Why an engine cannot be swapped out: by its configuration before it starts, and by its parts afterwards.

A reason is a text that completes "cannot be swapped out: ..."; empty means that nothing speaks against it. In doubt
there is a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared_store.base.errors import ConfigError
from shared_store.overcommit import support
from wooly_vllm import compat

EXECUTORS = (
    ("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
    ("vllm.v1.executor.multiproc_executor", "MultiprocExecutor"),
)
"""Executors that send everything to their workers by ``collective_rpc``, in order."""


def by_configuration(vllm_config: Any) -> str:
    """Return a reason in an engine's configuration."""
    return next(_by_configuration(vllm_config), "")


def _by_configuration(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    if config.kv_transfer_config is not None:
        yield "its KV connector reads and writes the KV cache outside of steps"
    if getattr(config, "ec_transfer_config", None) is not None:
        yield "its encoder cache connector reads and writes memory outside of steps"
    if getattr(getattr(config, "attention_config", None), "hisparse_config", None) is not None:
        yield "HiSparse has a part of its KV cache on the host"
    if parallel.data_parallel_size > 1 and getattr(config.model_config, "is_moe", True):
        yield "its data parallel ranks make every step together, as its experts are divided among them"
    if getattr(parallel, "enable_fault_tolerance", False):
        yield "its fault tolerance stops the loop of the engine, and starts it again, at any time"
    if getattr(parallel, "nnodes", 1) > 1:
        yield "it has workers on other nodes"
    if compat.device_of(config).type == "cuda" and not support.GPUS:
        yield support.REFUSAL
    elif compat.device_of(config).type == "cuda" and not compat.swaps_on_gpus():
        yield f"swapping vLLM {compat.version()} on a GPU was not tested; {', '.join(compat.SWAPPED_ON_GPUS)} was"


def by_parts(engine: Any) -> str:
    """Return a reason in a started engine: a part that has another class than the ones that wooly knows."""
    try:
        return next(_by_parts(engine), "")
    except ConfigError as error:
        return str(error)


def _by_parts(engine: Any) -> Iterator[str]:
    known = tuple(compat.find(module, name)[0] for module, name in EXECUTORS)
    executor, scheduler = engine.model_executor, engine.scheduler
    if not isinstance(executor, known) or isinstance(executor, _other_executors()):
        yield f"its executor is {type(executor).__name__}"
    (base,) = compat.find("vllm.v1.core.sched.scheduler", "Scheduler")
    if not isinstance(scheduler, base):
        yield f"its scheduler is {type(scheduler).__name__}, a class of another package"
    pool = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    if pool is None or any(not hasattr(pool, name) for name in ("blocks", "free_block_queue", "evict_blocks")):
        yield "its scheduler has no block pool where wooly looks for it"
    for name in ("pause_state", "set_pause_state", "get_request_counts"):
        if not hasattr(scheduler, name):
            yield f"its scheduler has no {name}"
    try:
        workers = executor.collective_rpc("wooly_holdings")
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        compat.logger().debug("wooly: wooly_holdings: %s", error)
        yield "its workers are of a kind that wooly does not know"
        return
    yield from (str(worker["refusal"]) for worker in workers if worker["refusal"])
    if not all(worker["shares"] for worker in workers):
        yield "its weights are private to it"


def _other_executors() -> tuple[type, ...]:
    """Return subclasses of known executors that run workers elsewhere."""
    return compat.find("vllm.v1.executor.uniproc_executor", "ExecutorWithExternalLauncher")
