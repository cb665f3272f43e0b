"""transformers' internals that wooly uses, and the check that they exist. No other module knows versions.

Relies on, in every supported version: ``PreTrainedModel.from_pretrained`` builds a model of meta tensors and calls the
static ``_load_pretrained_model``, which loads the checkpoint's tensors, records the weight conversions that it used on
the model, and returns a ``LoadStateDictInfo``. All other tensors are initialised afterwards. :func:`check` runs before
anything is replaced, so that a transformers that moved one of these names is refused and stays unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import ConfigError, UnsupportedError
from shared_store.runtime import versions as supported

Load = Callable[..., tuple[Any, Any]]
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

_LOAD_PARAMETERS = ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
_CONFIG_FIELDS = {
    "device_map",
    "device_mesh",
    "dtype",
    "dtype_plan",
    "hf_quantizer",
    "ignore_mismatched_sizes",
    "pretrained_model_name_or_path",
    "weight_mapping",
}
_INFO_FIELDS = {
    "missing_keys",
    "unexpected_keys",
    "mismatched_keys",
    "error_msgs",
    "conversion_errors",
    "skipped_pp_keys",
}
_BETWEEN_LOADS = {"collected_tensors", "layer_targets", "compiled_sources", "_was_used", "_active"}
"""Attributes that a weight conversion has only while it is used; all others define it."""


def version() -> str:
    """Return transformers' version."""
    import transformers

    return str(transformers.__version__)


def check() -> None:
    """Check every internal name that wooly uses.

    Raises:
        ConfigError: transformers is too old, or has moved a name.
    """
    known = supported.range_of("transformers")
    if known is not None and known.follows(version()):
        raise ConfigError(f"transformers {version()} is too old for wooly; install {supported.named('transformers')}")
    if problem := next(_problems(), None):
        raise _moved(problem)


def _problems() -> Iterator[str]:
    """Yield a description of each name that is missing or different."""
    try:
        from transformers.core_model_loading import WeightTransform
        from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel, caching_allocator_warmup
        from transformers.utils.loading_report import LoadStateDictInfo
    except ImportError as error:
        yield str(error)
        return
    kinds = {
        "from_pretrained": classmethod,
        "_load_pretrained_model": staticmethod,
        "_finalize_model_loading": staticmethod,
        "_initialize_weights": FunctionType,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(vars(PreTrainedModel).get(name), kind)]
    yield from (f"PreTrainedModel.{name} is gone, or another kind of method" for name in wrong)
    if not wrong and list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters) != _LOAD_PARAMETERS:
        yield "PreTrainedModel._load_pretrained_model takes other arguments"
    if not isinstance(caching_allocator_warmup, FunctionType):
        yield "caching_allocator_warmup is not a function"
    if missing := _CONFIG_FIELDS - _fields(LoadStateDictConfig):
        yield f"LoadStateDictConfig has no {', '.join(sorted(missing))}"
    if _fields(LoadStateDictInfo) != _INFO_FIELDS:
        yield "LoadStateDictInfo has other fields"
    if not hasattr(WeightTransform, "was_used") or not hasattr(WeightTransform, "_was_used"):
        yield "WeightTransform does not record whether it was used"


def replace(name: str, wrap: Wrapper) -> None:
    """Replace a method of ``PreTrainedModel`` by a wrapper of it, of the same kind."""
    from transformers.modeling_utils import PreTrainedModel

    stock = vars(PreTrainedModel)[name]
    if isinstance(stock, (classmethod, staticmethod)):
        setattr(PreTrainedModel, name, type(stock)(wrap(stock.__func__)))
    else:
        setattr(PreTrainedModel, name, wrap(stock))


def wrap_method(name: str, wrap: Wrapper) -> None:
    """Wrap a method that ``PreTrainedModel`` has or inherits; a class that overrides it calls the wrapper, if any."""
    from transformers.modeling_utils import PreTrainedModel

    stock = vars(PreTrainedModel).get(name)
    if stock is None:

        @functools.wraps(getattr(PreTrainedModel, name))
        def stock(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(PreTrainedModel, self), name)(*args, **kwargs)

    setattr(PreTrainedModel, name, wrap(stock))


def parts_called_alone(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that are also called without it: the base model, and the text encoder."""
    found: Any = model
    parts = [found.base_model]
    with contextlib.suppress(AttributeError):  # a class's own `get_encoder` may need a part that this model lacks
        parts.append(found.get_encoder())
    unique = {id(part): part for part in parts if isinstance(part, nn.Module) and part is not model}
    return list(unique.values())


def replace_warmup(wrap: Wrapper) -> None:
    """Replace ``caching_allocator_warmup``, which the load calls first, by a wrapper."""
    from transformers import modeling_utils

    modeling_utils.caching_allocator_warmup = wrap(modeling_utils.caching_allocator_warmup)


def replace_distributed(wrap: Wrapper) -> None:
    """Wrap the loading of distributed checkpoints, which transformers has from 5.23 on."""
    from transformers.modeling_utils import PreTrainedModel

    name = "_load_and_finalize_distributed_pretrained_model"
    if stock := getattr(PreTrainedModel, name, None):
        setattr(PreTrainedModel, name, wrap(stock))


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise :class:`UnsupportedError` for arguments of ``from_pretrained`` with which weights cannot be shared.

    Checked before transformers does anything: some versions have read all weights when they call the load.
    """
    if arguments.get("gguf_file"):
        raise UnsupportedError("GGUF files are converted while they are read")
    if arguments.get("state_dict") is not None:
        raise UnsupportedError("weights that are passed as a state dict have no checkpoint that identifies them")


def check_supported(state_dict: Any, files: list[str] | None, load_config: Any) -> None:
    """Raise :class:`UnsupportedError` for loads that cannot be shared, before anything is loaded."""
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    quantizer = load_config.hf_quantizer
    if quantizer is not None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", type(quantizer).__name__)
        raise UnsupportedError(f"quantized weights ({getattr(method, 'value', method)}) are not shared yet")
    if state_dict is not None or not files:
        raise UnsupportedError("there are no checkpoint files")
    if is_deepspeed_zero3_enabled():
        raise UnsupportedError("DeepSpeed ZeRO-3 divides weights among processes")
    if is_fsdp_enabled():
        raise UnsupportedError("FSDP divides weights among processes")
    if load_config.device_mesh is not None:
        raise UnsupportedError("a device mesh (tensor, expert, pipeline or data parallelism) divides weights")


def device_of(load_config: Any) -> torch.device:
    """Return the device that weights are loaded to.

    Raises:
        UnsupportedError: there are several, or the disk is one, or the device has no shared memory.
    """
    places = {_torch_device(place) for place in (load_config.device_map or {"": "cpu"}).values()}
    if len(places) > 1:
        names = sorted(str(place or "disk") for place in places)
        raise UnsupportedError(f"weights go to several devices ({', '.join(names)})")
    (place,) = places
    if place is None or place.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"weights on {place or 'the disk'} cannot be shared")
    return place


def nbytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and persistent buffers, which may be on the meta device."""
    return sum(tensor.nbytes for tensor in {id(it): it for it in model.state_dict(keep_vars=True).values()}.values())


def onto_one_device(load_config: Any) -> bool:
    """Return True if all weights go to one device. The device map is resolved by now."""
    places = set(map(_torch_device, (load_config.device_map or {"": "cpu"}).values()))
    return len(places) == 1 and None not in places


def _torch_device(place: Any) -> torch.device | None:
    """Return the device of a device map's value; None for the disk."""
    if place == "disk":
        return None
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def conversions(load_config: Any) -> list[Any]:
    """Describe each weight conversion of a load, in plain JSON types.

    Raises:
        UnsupportedError: a conversion depends on an object that cannot be compared between processes.
    """
    return [_describe(conversion) for conversion in load_config.weight_mapping or []]


def _describe(thing: Any) -> Any:
    if isinstance(thing, (str, int, float, bool, type(None))):
        return thing
    if isinstance(thing, (list, tuple)):
        return [_describe(part) for part in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted(map(str, map(_describe, thing)))
    if isinstance(thing, dict):
        return {str(key): _describe(value) for key, value in thing.items()}
    if isinstance(thing, (torch.dtype, torch.device)):
        return str(thing)
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}"
    if callable(thing) or type(thing).__module__.partition(".")[0] != "transformers":
        raise UnsupportedError(f"a weight conversion depends on {type(thing).__name__}, which cannot be compared")
    names = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    values = {name: getattr(thing, name) for name in names if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    kept = {name: _describe(value) for name, value in values.items() if name not in _BETWEEN_LOADS}
    return [_describe(type(thing)), kept]


def outcome(model: nn.Module, load_config: Any, info: Any) -> dict[str, Any]:
    """Return the result of a load beside tensors, in plain JSON types.

    Raises:
        UnsupportedError: the load had errors, which transformers reports.
    """
    if info.error_msgs or info.conversion_errors:
        raise UnsupportedError("loading had errors")
    if info.skipped_pp_keys:
        raise UnsupportedError("pipeline parallelism divides weights among processes")
    named: Any = model
    used = {id(conversion) for conversion in named._weight_conversions}
    return {
        "missing": sorted(info.missing_keys),
        "unexpected": sorted(info.unexpected_keys),
        "mismatched": sorted([name, list(found), list(wanted)] for name, found, wanted in info.mismatched_keys),
        "conversions": [number for number, one in enumerate(load_config.weight_mapping or []) if id(one) in used],
    }


def restore(model: nn.Module, load_config: Any, state: dict[str, Any]) -> Any:
    """Restore the result of the publisher's load; return its ``LoadStateDictInfo``."""
    from transformers.utils.loading_report import LoadStateDictInfo

    mapping = load_config.weight_mapping or []
    used = [mapping[number] for number in state["conversions"]]
    for conversion in used:
        conversion._was_used = True
    named: Any = model
    named._weight_conversions = used
    return LoadStateDictInfo(
        missing_keys=set(state["missing"]),
        unexpected_keys=set(state["unexpected"]),
        mismatched_keys={(name, torch.Size(found), torch.Size(wanted)) for name, found, wanted in state["mismatched"]},
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _moved(problem: str) -> ConfigError:
    return ConfigError(
        f"this transformers ({version()}) differs from those that wooly supports: {problem}; "
        f"install {supported.named('transformers')}, or a newer wooly"
    )
