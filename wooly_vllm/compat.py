"""vLLM's internals that wooly uses, and the differences between supported versions. No other module knows versions.

Relies on, in every supported version: ``DefaultModelLoader._prepare_weights`` names the files that it will read;
``initialize_model`` builds a model without loading it; ``process_weights_after_loading`` runs each layer's
post-processing; layers register themselves in ``compilation_config.static_forward_context``.
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
from shared_store.overcommit import support
from shared_store.runtime import versions as supported


def moved(name: str, error: Exception) -> ConfigError:
    """Return the error for a name that this vLLM does not have where wooly expects it."""
    return ConfigError(
        f"this vLLM ({version()}) has no {name} where wooly looks for it ({error}); install "
        f"{supported.named('vllm')}, which wooly supports, or a newer wooly"
    )


@functools.cache
def warn_of_version() -> None:
    """Warn once in a process if this vLLM is not a supported version. It may work: names that moved are detected."""
    known = supported.range_of("vllm")
    if known is not None and not known.has(version()):
        logger().warning(
            "wooly: vLLM %s is not a version that wooly supports and was tested with: install '%s', or a newer wooly. "
            "Models may be loaded the stock way, or fail to load.",
            version(),
            known,
        )


def find(module: str, *names: str) -> tuple[Any, ...]:
    """Return objects of a vLLM module by name. Raises :class:`ConfigError` with advice if one is missing."""
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise moved(f"{module}.{'/'.join(names)}", error) from error


def version() -> str:
    """Return vLLM's version."""
    import vllm

    return str(vllm.__version__)


def logger() -> logging.Logger:
    """Return a logger for which vLLM's workers have a handler."""
    (init,) = find("vllm.logger", "init_logger")
    found: logging.Logger = init("vllm.wooly")
    return found


def loader_of(vllm_config: Any) -> Any:
    """Return a new loader of a configuration's load format."""
    (make,) = find("vllm.model_executor.model_loader", "get_model_loader")
    return make(vllm_config.load_config)


def knows_external_weights() -> bool:
    """Return True if this vLLM asks loaders for the bytes of another process's weights (0.32 and later)."""
    (base,) = find("vllm.model_executor.model_loader.base_loader", "BaseModelLoader")
    return hasattr(base, "get_external_weight_memory")


def call_on_gpu(then: Callable[[], None]) -> None:
    """Call a function if vLLM runs on GPUs here. Initialises none."""
    (platform,) = find("vllm.platforms", "current_platform")
    if platform.is_cuda():
        then()


def one_engine_a_process() -> bool:
    """Return True if an engine has a process of its own, False if it is in that of the program that made it."""
    (envs,) = find("vllm", "envs")
    return bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def packs_small_weights() -> bool:
    """Return True if this vLLM has the known kernel for small packed weights on a CPU (0.29 and later)."""
    return hasattr(importlib.import_module("vllm._custom_ops"), "weight_packed_linear_cpu")


def replace_function(module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a module's function by a wrapper of it."""
    (stock,) = find(module, name)
    setattr(importlib.import_module(module), name, wrap(stock))


def register_loader(name: str, loader: type) -> None:
    """Register a load format, replacing vLLM's own of that name. Idempotent."""
    register, formats = find(
        "vllm.model_executor.model_loader", "register_model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"
    )
    if name not in formats:
        register(name)(loader)
    formats[name] = loader  # `register_model_loader` warns about a name that is taken, which is intended here


def refuse_format(name: str, error: ConfigError) -> None:
    """Make vLLM raise an error when it makes a loader of a load format."""

    def refuse(_: Any) -> NoReturn:
        raise error

    (formats,) = find("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER")
    formats[name] = refuse


def device_of(vllm_config: Any) -> torch.device:
    """Return the device of an engine's weights."""
    return torch.device(vllm_config.device_config.device)


def gpu_of(local_rank: int) -> torch.device:
    """Return the GPU of a rank on this node, by its number in this process."""
    (platform,) = find("vllm.platforms", "current_platform")
    return torch.device("cuda", platform.logical_device_id_to_visible_device_id(local_rank))


def uuid_of_gpu(rank: int) -> str:
    """Return the store's name of the GPU of a rank on this node, without initialising CUDA."""
    (platform,) = find("vllm.platforms", "current_platform")
    return str(platform.get_device_uuid(rank))


def bytes_of_gpu(rank: int) -> int:
    """Return the memory of the GPU of a rank on this node, in bytes, without initialising CUDA."""
    (platform,) = find("vllm.platforms", "current_platform")
    return int(platform.get_device_total_memory(rank))


SWAPPED_ON_GPUS = ("0.26",)
"""Versions of which engines on a GPU may be swapped out, where :mod:`shared_store.overcommit.support` has GPUs."""


def swaps_on_gpus() -> bool:
    """Return True for a version whose engines on a GPU may be swapped out."""
    return support.GPUS and version().startswith(tuple(f"{known}." for known in SWAPPED_ON_GPUS))


def block_bytes(vllm_config: Any) -> int:
    """Return an estimate of the bytes of one KV block in one worker, for a decoder whose layers are alike."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    (narrow,) = find("vllm.utils.torch_utils", "STR_DTYPE_TO_TORCH_DTYPE")
    dtype = narrow.get(cache.cache_dtype, model.dtype)  # `auto` is none
    elements = model.get_num_kv_heads(parallel) * model.get_head_size() * (1 if model.use_mla else 2)
    tokens = cache.block_size
    if not cache.user_specified_block_size and not model.use_mla and tokens in (None, cache.DEFAULT_BLOCK_SIZE):
        tokens = _BLOCK_TOKENS  # 0.33 chooses it once the model is loaded, and has its least default until then
    return int(model.get_num_layers(parallel) * elements * tokens * dtype.itemsize)


_BLOCK_TOKENS = 128
"""Tokens of a block, where vLLM has not chosen them yet; its greatest default."""


def methods_that_synchronize(*, imported_only: bool = False) -> Iterator[tuple[type, str]]:
    """Iterate over classes and methods of a worker that synchronise with its GPU, and raise errors of earlier kernels.

    Args:
        imported_only: skip modules that this process has not imported. A worker that has loaded a model has imported
            the model runner that it uses, of vLLM's two; importing the other would take a quarter of a second.
    """
    for module, name, methods in _SYNCHRONIZING:
        if imported_only and module not in sys.modules:
            continue
        (owner,) = find(module, name)
        yield from ((owner, method) for method in methods)


_SYNCHRONIZING = (
    (
        "vllm.v1.worker.gpu_worker",
        "Worker",
        ("determine_available_memory", "compile_or_warm_up_model", "execute_model", "sample_tokens"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput", ("get_output",)),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput", ("get_output",)),
)


def models_of(worker: Any) -> list[nn.Module]:
    """Return the models that a worker has loaded: the target, and a draft model if there is one."""
    runner = worker.model_runner
    found = (runner.get_model() if getattr(runner, "model", None) is not None else None, worker.get_draft_model())
    return [model for model in found if model is not None]


def methods_that_write_weights(worker: type) -> list[tuple[str, Callable[..., Any]]]:
    """Return the methods of a worker's class that write to weights, or prepare to."""
    find(worker.__module__, worker.__name__)
    if not hasattr(worker, "reload_weights"):
        raise moved(f"{worker.__name__}.reload_weights", AttributeError("reload_weights"))
    return [(name, found) for name in _WEIGHT_WRITERS if (found := getattr(worker, name, None)) is not None]


_WEIGHT_WRITERS = (
    "reload_weights",
    "reset_weights",
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
)


@contextlib.contextmanager
def outside_sleep_pool() -> Iterator[bool]:
    """Allocate outside of the memory pool for weights of an engine with sleep mode; yield True if there is one.

    Memory that is freed in the pool is not released to the device before loading has ended, not even by
    ``torch.cuda.empty_cache``. Memory in the pool is offloaded when the engine sleeps, which wooly does itself for
    shared weights. A nested pool has no effect: torch uses the first pool that matches the thread.
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
        torch._C._cuda_releasePool(device, pool.id)  # `begin` has counted another user


def _sleep_pool() -> Any:
    """Return the pool that this process allocates from now, if it belongs to vLLM's sleep mode."""
    if _SLEEP_ALLOCATOR not in sys.modules:
        return None
    (kind,) = find(_SLEEP_ALLOCATOR, "CuMemAllocator")
    allocator = kind.instance
    if allocator is None or allocator.current_tag == kind.default_tag:
        return None
    made = allocator.allocator_and_pools[allocator.current_tag]
    latest = made[-1] if isinstance(made, list) else made  # a list of all pools in 0.32 and later
    return latest[0]


_SLEEP_ALLOCATOR = "vllm.device_allocator.cumem"


def weight_files(loader: Any, model_config: Any, model_class: type[nn.Module]) -> list[tuple[str, Path]]:
    """Return the files that vLLM's default loader will read for a model: name in the checkpoint, and path.

    Raises:
        UnsupportedError: the model reads weights from other places too.
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
    """Return the class that vLLM will build for a configuration."""
    (architecture,) = find("vllm.model_executor.model_loader.utils", "get_model_architecture")
    found: type[nn.Module] = architecture(model_config)[0]
    return found


class Registers:
    """What vLLM remembers of the layers that it has built, as it was when this object was made.

    Layers register by name, and rotary modules are cached by their settings. Without this a second build would raise an
    error about a duplicate layer, or reuse a module of the first.
    """

    def __init__(self, vllm_config: Any) -> None:
        (ropes,) = find("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT")
        compilation = vllm_config.compilation_config
        try:
            self._registers: list[Any] = [ropes, compilation.static_forward_context]
        except AttributeError as error:
            raise moved("CompilationConfig.static_forward_context", error) from error
        self._registers += [it for name in _LAYER_LISTS if (it := getattr(compilation, name, None)) is not None]
        self._before = [register.copy() for register in self._registers]

    def restore(self) -> None:
        """Forget everything that was built since."""
        for register, content in zip(self._registers, self._before, strict=True):
            register.clear()
            (register.extend if isinstance(register, list) else register.update)(content)


@contextlib.contextmanager
def building(vllm_config: Any, model_config: Any) -> Iterator[None]:
    """Set defaults for building a model; if the build fails, restore vLLM's registers."""
    (default_dtype,) = find("vllm.utils.torch_utils", "set_default_torch_dtype")
    registers = Registers(vllm_config)
    try:
        with default_dtype(model_config.dtype):
            yield
    except BaseException:
        registers.restore()
        raise


_LAYER_LISTS = ("static_all_moe_layers",)


def initialize(vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
    """Build a model whose weights will be shared, without loading them."""
    (build,) = find(_BUILDING, "initialize_model")
    with _recording_no_reload():
        model = build(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
    assert isinstance(model, nn.Module)  # noqa: S101 - vLLM's contract
    return model


_BUILDING = "vllm.model_executor.model_loader.utils"


@contextlib.contextmanager
def _recording_no_reload() -> Iterator[None]:
    """Leave out what vLLM records of each layer for a reload in place, which shared weights refuse.

    It is a quarter of the time that building a model takes.
    """
    module = importlib.import_module(_BUILDING)
    stock = getattr(module, _RECORD, None)
    if stock is None:
        yield
        return
    setattr(module, _RECORD, lambda _: None)
    try:
        yield
    finally:
        setattr(module, _RECORD, stock)


_RECORD = "record_metadata_for_reloading"


def method_of(layer: nn.Module) -> Any:
    """Return the method whose post-processing vLLM runs for a layer, or None."""
    method = getattr(layer, "quant_method", None)
    return method if method is not None and isinstance(method, _method_base()) else None


@functools.cache
def _method_base() -> Any:
    return find("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase")[0]


def is_configuration(thing: Any) -> bool:
    """Return True for a configuration object: it follows from the weight key, or concerns processes."""
    (quantization,) = find("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig")
    elsewhere = ("vllm.config", "vllm.distributed", "torch.distributed", "transformers.")
    return isinstance(thing, quantization) or type(thing).__module__.startswith(elsewhere)


def takes_final_tensors(method: Any) -> bool:
    """Return True if a method accepts that its layer's tensors are final already (0.30 and later)."""
    return _declaring_final() is not None and bool(method.supports_pre_processed_weights)


def _declaring_final() -> Callable[[], contextlib.AbstractContextManager[None]] | None:
    return getattr(importlib.import_module("vllm.model_executor.utils"), "weights_already_processed", None)


def completes_itself(layer: nn.Module) -> bool:
    """Return True if a layer has post-processing beside its method's, as attention layers do."""
    return callable(getattr(layer, "process_weights_after_loading", None))


def post_process_layer(method: Any, layer: nn.Module, device: torch.device) -> None:
    """Run the post-processing of one layer as vLLM does after loading."""
    (moved_there,) = find("vllm.model_executor.model_loader.utils", "device_loading_context")
    with moved_there(layer, device):
        method.process_weights_after_loading(layer)
    update: Any = getattr(layer, "update_param_tp_status", None)
    if update is not None:
        update()


def post_process_bound(model: nn.Module, model_config: Any, device: torch.device, done: Iterable[nn.Module]) -> None:
    """Run the post-processing of a model whose tensors are final.

    Declares them final to versions that support it (0.30 and later).

    Args:
        model: bound.
        model_config: vLLM's.
        device: of the weights.
        done: layers whose methods are not run.
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
    """Make a method's post-processing do nothing in this context."""
    own = vars(method)
    before = dict(own)
    own.update(process_weights_after_loading=lambda _: None, supports_pre_processed_weights=True)
    try:
        yield
    finally:
        own.clear()
        own.update(before)


def parallel_ranks(vllm_config: Any, model_config: Any) -> dict[str, int]:
    """Return the sizes of all parallel groups that divide weights, and this process's ranks.

    Before the groups exist, for an engine with one worker only.
    """
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size == parallel.pipeline_parallel_size == 1:
        return {
            "tensor_rank": 0,
            "tensor_size": 1,
            "pipeline_rank": 0,
            "pipeline_size": 1,
            **divided_further(parallel, experts=bool(getattr(model_config, "is_moe", True))),
        }
    tensor_rank, tensor_size = find(
        "vllm.distributed", "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"
    )
    (pipeline,) = find("vllm.distributed", "get_pp_group")
    return {
        "tensor_rank": tensor_rank(),
        "tensor_size": tensor_size(),
        "pipeline_rank": pipeline().rank_in_group,
        "pipeline_size": pipeline().world_size,
        **divided_further(parallel, experts=bool(getattr(model_config, "is_moe", True))),
    }


def divided_further(parallel: Any, *, experts: bool) -> dict[str, int]:
    """Return the sizes and ranks of groups other than tensor and pipeline parallel ones.

    Data parallel ranks divide experts: whole experts with expert parallelism, slices of each without it. A model
    without experts is the same on all of them.
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
