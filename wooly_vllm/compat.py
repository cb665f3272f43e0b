"""The one module that knows vLLM's versions: what moved between those that we support, and what of its inside we use.

Relies on, in every supported version: ``DefaultModelLoader._prepare_weights`` names the files it will read;
``initialize_model`` builds without loading; ``process_weights_after_loading`` runs each layer's post-processing;
layers register themselves in ``compilation_config.static_forward_context``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from shared_store.base.errors import ConfigError, UnsupportedError
from shared_store.runtime import versions as supported


def moved(what: str, error: Exception) -> ConfigError:
    """The error for a hook that is not where it was."""
    return ConfigError(
        f"this vLLM ({version()}) has no {what} where wooly looks for it ({error}); install "
        f"{supported.named('vllm')}, which wooly supports, or a newer wooly"
    )


@functools.cache
def warn_of_version() -> None:
    """Say, once in a process, that wooly was not made for this vLLM. It may work: what has moved is noticed."""
    known = supported.range_of("vllm")
    if known is not None and not known.has(version()):
        logger().warning(
            "wooly: vLLM %s is not a version that wooly supports, and was not tested with it: install '%s', or a newer "
            "wooly. What wooly misses in it is an error, or a model that is loaded the stock way.",
            version(),
            known,
        )


def find(module: str, *names: str) -> tuple[Any, ...]:
    """Names of a vLLM module. Raises :class:`ConfigError` with advice when one is missing."""
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise moved(f"{module}.{'/'.join(names)}", error) from error


def version() -> str:
    """The version of vLLM."""
    import vllm

    return str(vllm.__version__)


def logger() -> logging.Logger:
    """A logger that vLLM's workers have a handler for."""
    (init,) = find("vllm.logger", "init_logger")
    found: logging.Logger = init("vllm.wooly")
    return found


def loader_of(vllm_config: Any) -> Any:
    """A loader of a configuration's load format."""
    (make,) = find("vllm.model_executor.model_loader", "get_model_loader")
    return make(vllm_config.load_config)


def knows_external_weights() -> bool:
    """Whether this vLLM asks its loaders for weights that another process holds (from 0.32 on)."""
    (base,) = find("vllm.model_executor.model_loader.base_loader", "BaseModelLoader")
    return hasattr(base, "get_external_weight_memory")


def when_on_gpu(then: Callable[[], None]) -> None:
    """Call a function if this process's vLLM runs on GPUs. Touches none."""
    (platform,) = find("vllm.platforms", "current_platform")
    if platform.is_cuda():
        then()


def packs_small_weights() -> bool:
    """Whether this vLLM has the kernel for small packed weights as a function that we know (from 0.29 on)."""
    return hasattr(importlib.import_module("vllm._custom_ops"), "weight_packed_linear_cpu")


def replace_function(module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a wrapper in the place of a module's function."""
    (stock,) = find(module, name)
    setattr(importlib.import_module(module), name, wrap(stock))


def register_loader(name: str, loader: type) -> None:
    """Register a load format, in the place of vLLM's own where it has one of that name; once is enough."""
    register, formats = find(
        "vllm.model_executor.model_loader", "register_model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"
    )
    if name not in formats:
        register(name)(loader)
    formats[name] = loader  # registering warns of a name that is taken, and here that is meant


def refuse_format(name: str, error: ConfigError) -> None:
    """Have vLLM raise an error whenever it makes a loader of a load format."""

    def refuse(_: Any) -> NoReturn:
        raise error

    (formats,) = find("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER")
    formats[name] = refuse


def device_of(vllm_config: Any) -> torch.device:
    """Return the device of an engine's weights."""
    return torch.device(vllm_config.device_config.device)


def gpu_of(local_rank: int) -> torch.device:
    """The GPU, as this process numbers them, of one of the ranks on this node."""
    (platform,) = find("vllm.platforms", "current_platform")
    return torch.device("cuda", platform.logical_device_id_to_visible_device_id(local_rank))


def where_gpu_errors_show(*, imported_only: bool = False) -> Iterator[tuple[type, str]]:
    """Classes and methods of a worker that wait for its GPU: there an error of an earlier kernel comes up.

    ``imported_only``: of those that this process has imported. A worker that has loaded a model has imported the one
    model runner of vLLM's two that it uses; importing the other would take it a quarter second.
    """
    for module, name, methods in _WAITING_FOR_THE_GPU:
        if imported_only and module not in sys.modules:
            continue
        (owner,) = find(module, name)
        yield from ((owner, method) for method in methods)


_WAITING_FOR_THE_GPU = (
    (
        "vllm.v1.worker.gpu_worker",
        "Worker",
        ("determine_available_memory", "compile_or_warm_up_model", "execute_model", "sample_tokens"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput", ("get_output",)),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput", ("get_output",)),
)


def models_of(worker: Any) -> list[nn.Module]:
    """The models that a worker has loaded: its own, and a draft model if there is one."""
    runner = worker.model_runner
    found = (runner.get_model() if getattr(runner, "model", None) is not None else None, worker.get_draft_model())
    return [model for model in found if model is not None]


def what_writes_weights(worker: type) -> list[tuple[str, Callable[..., Any]]]:
    """Methods of a worker's class that write to a loaded model's weights, or begin to."""
    find(worker.__module__, worker.__name__)
    if not hasattr(worker, "reload_weights"):
        raise moved(f"{worker.__name__}.reload_weights", AttributeError("reload_weights"))
    return [(name, found) for name in _WRITING_WEIGHTS if (found := getattr(worker, name, None)) is not None]


_WRITING_WEIGHTS = (
    "reload_weights",
    "reset_weights",
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
)


@contextlib.contextmanager
def outside_sleep_pool() -> Iterator[bool]:
    """In the block, memory does not come from the pool that a worker of an engine with sleep mode loads weights in.

    The block is told whether there is such a pool. What is freed in it is not given back before loading has ended, not
    even by ``torch.cuda.empty_cache``; and what lies in it is set aside when the engine sleeps, of which wooly looks
    after itself. A second pool inside of the first would not do: torch takes the first that fits a thread.
    """
    pool = _sleep_pool()
    if pool is None:
        yield False
        return
    device = torch.cuda.current_device()
    torch._C._cuda_endAllocateToPool(device, pool.id)
    try:
        yield True
    finally:
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool.id)
        torch._C._cuda_releasePool(device, pool.id)  # counted a user more when begun again


def _sleep_pool() -> Any:
    """The pool that this process allocates from right now, if vLLM's allocator for sleep mode made it."""
    if _SLEEP_ALLOCATOR not in sys.modules:
        return None
    (kind,) = find(_SLEEP_ALLOCATOR, "CuMemAllocator")
    allocator = kind.instance
    if allocator is None or allocator.current_tag == kind.default_tag:
        return None
    made = allocator.allocator_and_pools[allocator.current_tag]
    latest = made[-1] if isinstance(made, list) else made  # a list of all from 0.32 on
    return latest[0]


_SLEEP_ALLOCATOR = "vllm.device_allocator.cumem"


def weight_files(loader: Any, model_config: Any, model_class: type[nn.Module]) -> list[tuple[str, Path]]:
    """The files that vLLM's default loader will read for a model: name in the checkpoint, and path.

    Raises:
        UnsupportedError: the model reads weights from elsewhere too.
        ConfigError: the model's path has no weights.
    """
    if hasattr(model_class, "secondary_weights"):
        raise UnsupportedError(f"{model_class.__name__} reads weights from more than one place")
    given = {
        "model_name_or_path": getattr(model_config, "model_weights", None) or model_config.model,
        "subfolder": None,
        "revision": model_config.revision,
        "fall_back_to_pt": getattr(model_class, "fall_back_to_pt_during_load", True),
        "allow_patterns_overrides": getattr(model_class, "allow_patterns_overrides", None),
    }
    (default_loader,) = find("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")
    try:
        accepted = inspect.signature(default_loader._prepare_weights).parameters
        folder, files, *_ = loader._prepare_weights(**{key: value for key, value in given.items() if key in accepted})
    except (AttributeError, TypeError) as error:
        raise moved("DefaultModelLoader._prepare_weights", error) from error
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{given['model_name_or_path']}: {error}; check the model's path") from error
    return [(str(Path(file).relative_to(folder)), Path(file)) for file in sorted(set(files))]


def model_class(model_config: Any) -> type[nn.Module]:
    """The class that vLLM will build for a configuration."""
    (architecture,) = find("vllm.model_executor.model_loader.utils", "get_model_architecture")
    found: type[nn.Module] = architecture(model_config)[0]
    return found


@contextlib.contextmanager
def building(vllm_config: Any, model_config: Any) -> Iterator[None]:
    """Defaults for building a model; what a build that fails left behind in vLLM's registers is taken out again.

    Layers register under their names, and rotary modules are cached by their settings: a second build would trip over
    the first one's, or keep a module that was made of placeholders.
    """
    (default_dtype,) = find("vllm.utils.torch_utils", "set_default_torch_dtype")
    (ropes,) = find("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT")
    compilation = vllm_config.compilation_config
    try:
        registers: list[Any] = [ropes, compilation.static_forward_context]
    except AttributeError as error:
        raise moved("CompilationConfig.static_forward_context", error) from error
    registers += [found for name in _LAYER_LISTS if (found := getattr(compilation, name, None)) is not None]
    before = [register.copy() for register in registers]
    try:
        with default_dtype(model_config.dtype):
            yield
    except BaseException:
        for register, content in zip(registers, before, strict=True):
            register.clear()
            (register.extend if isinstance(register, list) else register.update)(content)
        raise


_LAYER_LISTS = ("static_all_moe_layers",)


def initialize(vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
    """Build a model without loading it."""
    (build,) = find("vllm.model_executor.model_loader.utils", "initialize_model")
    model = build(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
    assert isinstance(model, nn.Module)  # noqa: S101 - vLLM's contract
    return model


def method_of(layer: nn.Module) -> Any:
    """The method whose post-processing vLLM runs for a layer, or None."""
    (base,) = find("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase")
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, base) else None


def is_configuration(thing: Any) -> bool:
    """Whether an object says what an engine is to be: it follows from the weight key, or is about processes."""
    (quantization,) = find("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig")
    elsewhere = ("vllm.config", "vllm.distributed", "torch.distributed", "transformers.")
    return isinstance(thing, quantization) or type(thing).__module__.startswith(elsewhere)


def takes_final_tensors(method: Any) -> bool:
    """Whether a method can be told that its layer's tensors are final already (from 0.30 on)."""
    return _declaring_final() is not None and bool(method.supports_pre_processed_weights)


def _declaring_final() -> Callable[[], contextlib.AbstractContextManager[None]] | None:
    return getattr(importlib.import_module("vllm.model_executor.utils"), "weights_already_processed", None)


def completes_itself(layer: nn.Module) -> bool:
    """Whether a layer has post-processing of its own, apart from a method's: attention layers have."""
    return callable(getattr(layer, "process_weights_after_loading", None))


def post_process_layer(method: Any, layer: nn.Module, device: torch.device) -> None:
    """Run one layer's post-processing as vLLM does after loading."""
    (moved_there,) = find("vllm.model_executor.model_loader.utils", "device_loading_context")
    with moved_there(layer, device):
        method.process_weights_after_loading(layer)
    update: Any = getattr(layer, "update_param_tp_status", None)
    if update is not None:
        update()


def post_process_bound(model: nn.Module, model_config: Any, device: torch.device, done: Iterable[nn.Module]) -> None:
    """Run the post-processing of a model whose tensors are final, but for layers where it is ``done``.

    Versions that can are told that the tensors are final (0.30 on).
    """
    (process,) = find("vllm.model_executor.model_loader.utils", "process_weights_after_loading")
    declared = _declaring_final()
    with contextlib.ExitStack() as stack:
        for method in {id(method): method for layer in done if (method := method_of(layer)) is not None}.values():
            stack.enter_context(_doing_nothing(method))
        if declared:
            stack.enter_context(declared())
        process(model, model_config, device)


@contextlib.contextmanager
def _doing_nothing(method: Any) -> Iterator[None]:
    """In this context a method leaves its layers alone."""
    own = vars(method)
    before = dict(own)
    own.update(process_weights_after_loading=lambda _: None, supports_pre_processed_weights=True)
    try:
        yield
    finally:
        own.clear()
        own.update(before)


def parallel_ranks(vllm_config: Any, model_config: Any) -> dict[str, int]:
    """Sizes and this process's ranks of every way that weights are divided."""
    tensor_rank, tensor_size = find(
        "vllm.distributed", "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"
    )
    (pipeline,) = find("vllm.distributed", "get_pp_group")
    return {
        "tensor_rank": tensor_rank(),
        "tensor_size": tensor_size(),
        "pipeline_rank": pipeline().rank_in_group,
        "pipeline_size": pipeline().world_size,
        **divided_further(vllm_config.parallel_config, experts=bool(getattr(model_config, "is_moe", True))),
    }


def divided_further(parallel: Any, *, experts: bool) -> dict[str, int]:
    """Sizes and ranks beside those of tensors and pipelines.

    Experts are divided among data parallel ranks, too: as a whole with expert parallelism, in slices without it. A
    model without experts is the same on all of them.
    """
    context = parallel.prefill_context_parallel_size
    return {
        "data_size": parallel.data_parallel_size if experts else 1,
        "data_rank": parallel.data_parallel_rank if experts else 0,
        "expert_parallel": int(parallel.enable_expert_parallel),
        "context_size": context,
        "context_rank": parallel.rank if context > 1 else 0,
        "decode_context_size": parallel.decode_context_parallel_size,
    }
