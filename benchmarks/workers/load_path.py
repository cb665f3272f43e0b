"""One load of a model in a vLLM engine, timed in its parts, for the benchmark ``load_path``. The process ends with it.

Works with the wooly of another checkout too: a function that it does not have is not timed.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness.worker import Talk, now, play
from benchmarks.workers.watch import Stopwatch

PARTS = {
    "turn": ("wooly_vllm.memory.accounting", "_turn"),
    "accounting": ("wooly_vllm.memory.accounting", "external_bytes"),
    "connect": ("shared_store.client.session", "Session.connect"),
    "hash": ("shared_store.client.identify", "hash_files"),
    "open": ("shared_store.client.session", "Session.open"),
    "map": ("shared_store.torch.mapped_model", "MappedModel.map_for_reading"),
    "construct": ("wooly_vllm.compat", "initialize"),
    "bind": ("shared_store.torch.bind", "Binder.bind"),
    "post_process": ("wooly_vllm.compat", "post_process_bound"),
    "stock_load": ("wooly_vllm.loading.inner_loader", "InnerLoader.load_model"),
    "describe": ("wooly_vllm.loading.steps", "VllmSteps.describe"),
    "publish": ("shared_store.torch.load", "publish"),
    "digests": ("shared_store.torch.devices", "HostWork.digests"),
    "gpu_digests": ("shared_store.torch.devices", "CudaWork.digests"),
    "fill": ("shared_store.client.session", "Session.fill"),
    "commit": ("shared_store.client.session", "Session.commit"),
    "measure": ("wooly_vllm.loading.steps", "measure"),
    "private_bytes": ("shared_store.torch.mapped_model", "MappedModel.private_bytes"),
}
"""Module and name of each function of wooly that is timed, by label."""


class _Loaded(BaseException):
    """Ends the engine's start: the load has been measured. Not an ``Exception``, which vLLM might catch."""


def load(talk: Talk, job: dict[str, Any]) -> None:
    """Start an engine up to the end of its load, and send ``loaded``.

    ``job``: ``model``, ``role`` (``stock``, ``construct``, or wooly's), ``settings`` (arguments of the engine).
    Waits for the word ``start`` once everything is imported.
    """
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    watch = Stopwatch()
    loader: Any = BaseModelLoader
    wooly = job["role"] not in ("stock", "construct")
    if wooly:
        loader = _watched(watch)
    elif job["role"] == "construct":
        BaseModelLoader.load_model = _construct
    loader.load_model = _timed(loader.load_model, watch, talk)
    talk.send("imported")
    if next(talk.words(), "") != "start":
        return
    with contextlib.suppress(_Loaded):
        LLM(
            job["model"],
            load_format="wooly" if wooly else "auto",
            model_loader_extra_config={"fallback": False} if wooly else {},
            **job["settings"],
        )


def _watched(watch: Stopwatch) -> Any:
    """Time wooly's functions, and return its loader class."""
    import wooly_vllm
    from wooly_vllm.loading.loader import WoolyLoader

    wooly_vllm.register()  # vLLM calls it only if wooly is installed, not if it is just on the path
    for label, (module, path) in PARTS.items():
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each, None)
        if hasattr(owner, name):
            watch.watch(owner, name, label)
    return WoolyLoader


def _construct(_: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
    """Build the modules as vLLM's loader does, and load nothing."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(model_config.dtype), torch.device(vllm_config.device_config.device):
        return initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)


def _timed(stock: Callable[..., Any], watch: Stopwatch, talk: Talk) -> Callable[..., Any]:
    """Wrap ``load_model``: send its duration, CPU time, and the durations of its parts."""
    import torch

    def load_model(*args: Any, **kwargs: Any) -> Any:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        before = _seconds(watch.spans)  # vLLM's accounting calls wooly before the load
        cpu, began = time.process_time(), now()
        model = stock(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()
        ended, cpu = now(), time.process_time() - cpu
        parts = {label: spent - before.get(label, 0.0) for label, spent in _seconds(watch.spans).items()}
        accounting = before.get("accounting", 0.0)
        parts |= {"accounting": accounting, "turn": before.get("turn", 0.0)}
        talk.send("loaded", load_s=ended - began, total_s=ended - began + accounting, cpu_s=cpu, parts=parts)
        raise _Loaded(model)

    return load_model


def _seconds(spans: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Return the seconds in all calls of each function."""
    return {label: sum(end - begin for begin, end in found) for label, found in spans.items()}


def main() -> None:
    """Run the role given on the command line."""
    play({"load": load})
