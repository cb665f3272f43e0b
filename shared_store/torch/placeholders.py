"""Placeholders: tensors without memory of their own, for a model whose weights are about to be bound.

While :class:`Placeholders` is active, a call that would return *uninitialised* memory of a minimum size returns a
zero-dimensional tensor expanded to the shape: the right shape, dtype and device, with one element of memory. Only
uninitialised factories are intercepted: nothing can have been computed from their values before they are written.
Constants and computed tensors (rotary tables, slopes, index maps) are real from the start.

The element is NaN, or the largest integer, so that a read of a placeholder is visible in results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shared_store.base.errors import UnsupportedError
from shared_store.torch.views import StorageKey, storage_key

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)
_COPIES: frozenset[Callable[..., Any]] = frozenset({torch.clone, torch.Tensor.clone, torch.Tensor.__deepcopy__})
# Of the initialisers, those that torch passes to a mode. The methods that others are made of are executed:
# `nn.init.trunc_normal_` inspects the drawn values, and would never end without them.
_RANDOM: frozenset[Callable[..., Any]] = frozenset({nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_})
_NOT_WRITING = frozenset({"requires_grad_", "detach_"})
_EXPOSING = frozenset({"numpy", "__array__", "__dlpack__", "data_ptr"})  # with the address, a caller may write
_NOT_REPLACED = ("out", "pin_memory", "layout", "names")


@dataclass
class _Placeholder:
    element: torch.Tensor  # kept allocated: no other tensor may get its address
    shape: torch.Size
    real: torch.Tensor | None = None  # memory, if the constructor wrote to the placeholder


class Placeholders(TorchFunctionMode):
    """A context that makes placeholders of large uninitialised tensors, and the register of them.

    Attributes:
        min_bytes: smaller tensors are real.
        avoided_bytes: bytes that the placeholders would have had.
    """

    def __init__(self, min_bytes: int) -> None:
        """Replace uninitialised tensors of at least ``min_bytes`` bytes."""
        super().__init__()
        self.min_bytes = min_bytes
        self.avoided_bytes = 0
        self._made: dict[StorageKey, _Placeholder] = {}
        self._any_real = False

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, key: object) -> bool:
        return key in self._made

    def elements(self) -> Iterator[tuple[StorageKey, torch.Tensor]]:
        """Return the element of each placeholder, with the key of its storage."""
        return ((key, made.element) for key, made in self._made.items())

    def is_placeholder(self, tensor: torch.Tensor) -> bool:
        """Return True if a tensor's storage is that of a placeholder."""
        return self._find(tensor) is not None

    def _find(self, tensor: torch.Tensor) -> _Placeholder | None:
        key = storage_key(tensor)
        return None if key is None else self._made.get(key)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the result of a factory; execute all other calls."""
        kwargs = kwargs or {}
        if func in _FACTORIES and not any(kwargs.get(name) for name in _NOT_REPLACED):
            return self._make(func, args, dict(kwargs))
        if self._made:
            # A constructor makes thousands of calls. Most write nothing, and then only written placeholders matter.
            writes = _may_write(getattr(func, "__name__", "")) or "out" in kwargs
            if writes or self._any_real or func in _COPIES:
                handled, result = self._intercept(func, args, kwargs)
                if handled:
                    return result
        return func(*args, **kwargs)

    def _intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bool, torch.Tensor | None]:
        """Make a call unnecessary, and return True and its result; or prepare the memory that it uses."""
        with torch._C.DisableTorchFunction():  # other modes have nothing to do with the questions asked here
            if func is torch.Tensor.copy_ and all(self._unwritten(value) for value in args[:2]):
                return True, args[0]  # from a placeholder to a placeholder: there are no values to copy
            copies = func in _COPIES and self._unwritten(args[0])
            if not copies:
                target = _written(func, args, kwargs)
                if target is not None and func in _RANDOM and self._unwritten(target):
                    return True, target  # random values are about to be replaced, and not worth the memory
                self._before_write(target, (*args, *kwargs.values()))
        return (True, self._copy(*args)) if copies else (False, None)

    def written(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the memory of a placeholder that the constructor wrote to, if this tensor is all of it; else None."""
        made = self._find(tensor)
        return made.real if made is not None and _is_whole(tensor, made) else None

    def _copy(self, source: torch.Tensor, memo: dict[int, Any] | None = None) -> torch.Tensor:
        """Copy a placeholder as a placeholder. ``memo``: of ``deepcopy``."""
        copy = self._make(torch.empty_like, (source,), {})
        if memo is not None:
            memo[id(source)] = copy.requires_grad_(source.requires_grad)
        return copy

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            wanted: torch.Tensor = func(*args, **{**kwargs, "device": "meta"})
            nbytes = wanted.numel() * wanted.element_size()
            source = next(
                (value for value in (*args[:1], kwargs.get("input")) if isinstance(value, torch.Tensor)), None
            )
            device = kwargs.get("device") or (source.device if source is not None else None)
            real = nbytes < self.min_bytes or (device is not None and torch.device(device).type == "meta")
        if real:
            made = func(*args, **kwargs)
            assert isinstance(made, torch.Tensor)  # noqa: S101 - all factories return tensors
            return made
        element = torch.full((), _poison(wanted.dtype), dtype=wanted.dtype, device=device)  # surrounding modes apply
        with torch._C.DisableTorchFunction():
            key = storage_key(element)
            if key is None:  # a surrounding context makes tensors without memory
                return wanted
            self._made[key] = _Placeholder(element, wanted.shape)
            self.avoided_bytes += nbytes
            # Detached, so that it has no base: a tensor with a base is then a view of a placeholder.
            return element.expand(wanted.shape).detach().requires_grad_(wanted.requires_grad)

    def _unwritten(self, value: Any) -> bool:
        made = self._find(value) if isinstance(value, torch.Tensor) else None
        return made is not None and made.real is None

    def _before_write(self, target: torch.Tensor | None, values: tuple[Any, ...]) -> None:
        """Allocate memory for a placeholder before it is written to, and put its other tensor objects there too."""
        for tensor in _tensors_in(values):
            made = self._find(tensor)
            if made is None or (made.real is None and tensor is not target):
                continue
            if not _is_whole(tensor, made):
                raise UnsupportedError(
                    f"the model's constructor writes to a part or view of shape {tuple(tensor.shape)} "
                    f"of a weight of shape {tuple(made.shape)}"
                )
            if made.real is None:
                made.real = torch.full(made.shape, _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
                self._any_real = True
            tensor.data = made.real


def _is_whole(tensor: torch.Tensor, made: _Placeholder) -> bool:
    """Return True for a tensor of the whole placeholder; a view may have the same shape (a transposed square)."""
    return tensor.shape == made.shape and tensor._base is None


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the tensor that a call writes to."""
    if isinstance(out := kwargs.get("out"), torch.Tensor):
        return out
    if not _may_write(getattr(func, "__name__", "")):
        return None
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


@functools.cache
def _may_write(name: str) -> bool:
    """Return True if a function of this name may write to its first tensor, by torch's naming of in-place functions."""
    in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    return name in _EXPOSING or name == "__setitem__" or (in_place and name not in _NOT_WRITING)


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
