"""Guards for memory that refuses writes: a clear error before a kernel writes to weights that others read.

Shared weights on a GPU are mapped read-only: a kernel that writes to them would fail later, somewhere else, and take
the process's CUDA context with it. The writers that are known are stopped here, in Python. On a CPU, writes are
allowed and make private what they touch; the first optimizer that would do so to whole weights is told of.
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
from wooly_hf.sharing import unshare

log = logging.getLogger(__name__)


def refuses_writes(mapping: Mapping) -> bool:
    """Whether a write to a mapping would fail instead of making a private page."""
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
        f"{what} would write to {which}, which other processes read: it is mapped read-only. "
        "Call wooly_hf.unshare(model), or unshare only the module that is to change, before it"
    )


def install() -> None:
    """Guard optimizers, the initialization of weights, and PEFT's merging."""
    register_optimizer_step_pre_hook(_before_step)
    compat.replace("_initialize_weights", _wrap_initialize)
    when_imported("peft.tuners.tuners_utils", _guard_peft)


def watch(model: nn.Module) -> None:
    """Guard a model's shared tensors against ``load_state_dict``."""
    for module in model.modules():
        if any(_refuses(tensor) for _, tensor in _own(module)):
            module.register_load_state_dict_pre_hook(_BeforeLoad())  # type: ignore[no-untyped-call]  # torch's


class _BeforeLoad:
    """A module's hook before it copies values in.

    A copy of the module, in this process or pickled into another, has memory of its own and needs no guard: what is
    copied is a callable of the standard library that takes anything and does nothing.
    """

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            return  # takes the given tensors instead of their values
        for name, tensor in _own(module):
            if prefix + name in state_dict and _refuses(tensor):
                raise _refusal("load_state_dict", prefix + name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")


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
                    "wooly: %s writes to shared weights, which makes them this process's own, page by page. "
                    "To train adapters only, freeze the others with requires_grad_(False); "
                    "to make all private at once, call wooly_hf.unshare(model) first.",
                    name,
                )


def _wrap_initialize(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def initialize(self: Any, module: nn.Module, is_custom_code: bool = False) -> Any:
        if not getattr(module, "_is_hf_initialized", False):
            shared = [(name, tensor) for name, tensor in _own(module) if _refuses(tensor)]
            for name, tensor in shared:
                if not getattr(tensor, "_is_hf_initialized", False):  # transformers leaves those that have it alone
                    raise _refusal("initializing weights", f"{type(module).__name__}.{name}")
            if shared and is_custom_code:
                log.info("wooly: %s initializes itself, so it gets memory of its own", type(module).__name__)
                unshare(module)
        return stock(self, module, is_custom_code)

    return initialize


def _guard_peft(tuners_utils: ModuleType) -> None:
    """Guard ``merge`` of every kind of PEFT layer: those that are, and those whose modules come later."""
    base = tuners_utils.BaseTunerLayer

    base.__init_subclass__ = classmethod(_guard_merge)
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
        if not safe_merge:  # a safe merge makes new tensors
            for name, tensor in _own(self.get_base_layer()):
                if _refuses(tensor):
                    raise _refusal("merging an adapter in place (safe_merge=True would not)", name)
        return stock(self, safe_merge, *args, **kwargs)

    merge._wooly = True  # type: ignore[attr-defined]  # a mark for the next look
    cls.merge = merge  # type: ignore[attr-defined]  # has one: see above
