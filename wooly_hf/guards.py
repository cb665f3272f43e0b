"""Guards against writes to shared weights: an error in Python before a kernel writes.

On a GPU shared weights are mapped read-only. A kernel that writes to them fails later and elsewhere, and corrupts the
process's CUDA context. So known writers raise an error before that. On a CPU, writes are allowed and make the written
pages private; a warning is logged for the first optimizer that would do that to whole weights.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shared_store.base.errors import SharedWriteError
from shared_store.memory import Mapping
from shared_store.runtime.import_hooks import when_imported
from shared_store.torch.mapping_registry import mapping_of
from wooly_hf import compat
from wooly_hf.absent import looking
from wooly_hf.workload import process
from wooly_hf.workload.unshare import unshare

log = logging.getLogger(__name__)


def refuses_writes(mapping: Mapping) -> bool:
    """Return True if a write to a mapping fails, instead of making its page private."""
    return mapping.ordinal is not None


def _refuses(tensor: torch.Tensor | None) -> bool:
    if tensor is None:
        return False
    mapping = mapping_of(tensor)
    return mapping is not None and refuses_writes(mapping)


def _own(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _refusal(what: str, which: str) -> SharedWriteError:
    return SharedWriteError(
        f"{what} would write to {which}, which is shared with other processes and mapped read-only. "
        "Call wooly_hf.unshare(model) first, or unshare only the module that changes"
    )


def install() -> None:
    """Guard optimizers, the initialisation of weights, and merges of PEFT."""
    register_optimizer_step_pre_hook(_before_step)
    _watch_optimizers()
    compat.replace("_initialize_weights", _wrap_initialize)
    when_imported("peft.tuners.tuners_utils", _guard_peft)


def watch(model: nn.Module) -> None:
    """Guard the shared tensors of a model against ``load_state_dict``."""
    for module in model.modules():
        if any(_refuses(tensor) for _, tensor in _own(module)):
            module.register_load_state_dict_pre_hook(_BeforeLoad())  # type: ignore[no-untyped-call]  # torch's


class _BeforeLoad:
    """A module's hook that runs before ``load_state_dict`` copies values.

    A copy of the module, in this process or unpickled in another, has private memory and needs no guard. So the hook
    is copied as a callable of the standard library that accepts any arguments and does nothing.
    """

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            return  # replaces the tensors, and writes nothing
        for name, tensor in _own(module):
            if prefix + name in state_dict and _refuses(tensor):
                raise _refusal("load_state_dict", prefix + name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")


def _watch_optimizers() -> None:
    """Keep a workload on its device from when an optimizer has a parameter of its models, also of an adapter."""
    stock = torch.optim.Optimizer.add_param_group

    @functools.wraps(stock)
    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        stock(self, param_group)
        workload = process.current()
        if workload is not None and not workload.refusal:
            with looking():
                own = {id(parameter) for model in workload.models() for parameter in model.parameters()}
            if any(id(parameter) in own for parameter in self.param_groups[-1]["params"]):
                workload.refuse(f"an optimizer ({type(self).__name__}) has parameters of its model")

    torch.optim.Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]  # called by all optimizers


_warned = False


def _before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    global _warned  # noqa: PLW0603 - one warning a process
    name = f"{type(optimizer).__name__}.step"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mapping = None if parameter.grad is None else mapping_of(parameter)
            if mapping is None:
                continue
            if refuses_writes(mapping):
                raise _refusal(name, f"a parameter of shape {tuple(parameter.shape)}")
            if not _warned:
                _warned = True
                log.warning(
                    "wooly: %s writes to shared weights, which makes them private page by page. "
                    "To train adapters only, freeze all other parameters with requires_grad_(False); "
                    "to make all weights private at once, call wooly_hf.unshare(model) first.",
                    name,
                )


def _wrap_initialize(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def initialize(self: Any, module: nn.Module, is_custom_code: bool = False) -> Any:
        if not getattr(module, "_is_hf_initialized", False):
            shared = [(name, tensor) for name, tensor in _own(module) if _refuses(tensor)]
            for name, tensor in shared:
                if not getattr(tensor, "_is_hf_initialized", False):  # transformers skips tensors that have it
                    raise _refusal("initializing weights", f"{type(module).__name__}.{name}")
            if shared and is_custom_code:
                log.info("wooly: %s initializes itself, so its weights become private", type(module).__name__)
                unshare(module)
        return stock(self, module, is_custom_code)

    return initialize


def _guard_peft(tuners_utils: ModuleType) -> None:
    """Guard ``merge`` of all classes of PEFT layers, also of those that are imported later."""
    base = tuners_utils.BaseTunerLayer
    stock = vars(base).get("__init_subclass__")

    def init_subclass(cls: type, /, **keywords: Any) -> None:
        hook = super(base, cls).__init_subclass__ if stock is None else stock.__get__(None, cls)
        hook(**keywords)
        _guard_merge(cls)

    base.__init_subclass__ = classmethod(init_subclass)
    known = [base]
    for cls in known:
        _guard_merge(cls)
        known += cls.__subclasses__()


def _guard_merge(cls: type) -> None:
    stock = cls.__dict__.get("merge")
    if stock is None or getattr(stock, "_wooly", False):
        return

    @functools.wraps(stock)
    def merge(self: Any, safe_merge: bool = False, *args: Any, **kwargs: Any) -> Any:
        if not safe_merge:  # a safe merge allocates new tensors
            for name, tensor in _own(self.get_base_layer()):
                if _refuses(tensor):
                    raise _refusal("merging an adapter in place (safe_merge=True would not)", name)
        return stock(self, safe_merge, *args, **kwargs)

    merge._wooly = True  # type: ignore[attr-defined]  # do not wrap again
    cls.merge = merge  # type: ignore[attr-defined]  # the class has one, see above
