"""Why an engine is never held for others: ranks that wait for each other would wait for all that one of them waits for.

A reason is a text that completes "is never held: ..."; empty means that it may be. In doubt there is a reason: its
steps are free, and count for other workloads all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from shared_store.compute import support
from wooly_vllm import compat
from wooly_vllm.residency.refusals import EXECUTORS


def by_process() -> str:
    """Return a reason in the program that makes an engine. Ask before the engine makes process groups of its own."""
    groups = torch.distributed
    if groups.is_available() and groups.is_initialized() and groups.get_world_size() > 1:
        return f"its process is one of {groups.get_world_size()} ranks of torch.distributed, which wait for each other"
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "").isdigit() and int(os.environ["WORLD_SIZE"]) > 1:
        return f"its process was started as one of {os.environ['WORLD_SIZE']} ranks, which wait for each other"
    return ""


def by_configuration(vllm_config: Any) -> str:
    """Return a reason in an engine's configuration."""
    return next(_by_configuration(vllm_config), "")


def _by_configuration(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher":
        yield "an external launcher started its ranks, which schedule the same steps and wait for each other"
    if parallel.data_parallel_size > 1:
        yield "its data parallel ranks wait for each other"
    if getattr(parallel, "nnodes", 1) > 1:
        yield "it has workers on other nodes, whose devices this store does not know"
    if config.kv_transfer_config is not None or getattr(config, "ec_transfer_config", None) is not None:
        yield "other engines may wait for what its connector transfers between its steps"
    if compat.device_of(config).type != "cpu" and not support.GPUS:
        yield support.UNGATED


def by_parts(engine: Any) -> str:
    """Return a reason in a started engine: an executor that chooses its devices itself, or a scheduler of others."""
    executor, scheduler = engine.model_executor, engine.scheduler
    known = tuple(compat.find(module, name)[0] for module, name in EXECUTORS)
    (external,) = compat.find("vllm.v1.executor.uniproc_executor", "ExecutorWithExternalLauncher")
    if not isinstance(executor, known) or isinstance(executor, external):
        return f"its executor is {type(executor).__name__}, and the devices of its workers are not known"
    if not all(hasattr(scheduler, name) for name in ("pause_state", "set_pause_state", "get_request_counts")):
        return f"its scheduler is {type(scheduler).__name__}, which cannot pause"
    return ""
