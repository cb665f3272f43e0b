"""Durations inside of loaders, measured by wrapping functions of wooly and vLLM in this process.

Relies on the names of internal functions; changes nothing else of them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from types import MethodType
from typing import Any

from benchmarks.harness.worker import now


class Stopwatch:
    """Start and end of function calls, by label."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Time all future calls of a module's function or a class's method."""
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return stock(*args, **kwargs)
            finally:
                self.spans[label].append((began, now()))

        setattr(owner, name, staticmethod(timed) if isinstance(stock, MethodType) else timed)


def watch_stock(watch: Stopwatch, loaded: dict[str, Any]) -> None:
    """Time vLLM's own loader."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    _watch_load(BaseModelLoader, watch, loaded)


def watch_wooly(watch: Stopwatch, loaded: dict[str, Any]) -> None:
    """Time wooly's loader and its steps."""
    import wooly_vllm
    from shared_store.client.identify import Checkpoint
    from shared_store.client.session import Session
    from shared_store.torch import load
    from shared_store.torch.bind import Binder
    from shared_store.torch.mapped_model import MappedModel
    from wooly_vllm import compat
    from wooly_vllm.loading import inner_loader, loader
    from wooly_vllm.memory import accounting

    wooly_vllm.register()  # vLLM calls it only if wooly is installed, not if it is just on the path
    watch.watch(accounting, "external_bytes", "accounting")
    watch.watch(Session, "connect", "connect")
    watch.watch(Session, "open", "open")
    watch.watch(Checkpoint, "_hash", "hash")
    watch.watch(MappedModel, "map_for_reading", "map")
    watch.watch(compat, "initialize", "build")
    watch.watch(compat, "post_process_bound", "post_process")
    watch.watch(Binder, "bind", "bind")
    watch.watch(load, "publish", "publish")
    watch.watch(inner_loader.InnerLoader, "load_model", "inner_load")
    _watch_publish_memory(load, loaded)
    _watch_load(loader.WoolyLoader, watch, loaded)


def _watch_load(loader: Any, watch: Stopwatch, loaded: dict[str, Any]) -> None:
    """Time ``load_model``, GPU work included, and record the GPU memory that it took (bytes)."""
    import torch

    stock = loader.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
        began = now()
        model = stock(*args, **kwargs)
        torch.cuda.synchronize()
        watch.spans["load"].append((began, now()))
        loaded.update(
            torch_bytes=torch.cuda.memory_allocated() - allocated,
            device_bytes=free - torch.cuda.mem_get_info()[0],
            sizes=[parameter.nbytes for parameter in model.parameters()],
        )
        return model

    loader.load_model = load_model


def _watch_publish_memory(load: Any, loaded: dict[str, Any]) -> None:
    """Record the GPU's memory (bytes) when the model is loaded and publishing begins."""
    import torch

    stock = load.publish

    def publish(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        loaded.update(
            used_before_publish=total - free,
            cached_before_publish=torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
        )
        return stock(*args, **kwargs)

    load.publish = publish
