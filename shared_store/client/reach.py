"""Every tensor that a model can reach, also through plain objects: what a state dict does not show.

Engines keep references in attention implementations, kernel objects, lists, dicts, closures and bound methods. They
must follow when a weight moves into shared memory, or they would keep the old copy alive, or read a placeholder.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

_LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.dtype,
    torch.device,
)


def tensors_from(root: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor object once, with the path on which it was met first.

    Looks into modules, containers, ``__dict__`` and ``__slots__``, closures, default arguments, partials and bound
    methods. Does not look into classes, Python modules, or other objects that hide their parts in C.
    """
    seen: set[int] = set()
    keep: list[Any] = []  # an object that is made on the way must not leave its id to the next one
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, thing = stack.pop()
        if isinstance(thing, _LEAVES) or id(thing) in seen:
            continue
        seen.add(id(thing))
        keep.append(thing)
        if isinstance(thing, torch.Tensor):
            yield path, thing
        stack.extend(_parts(path, thing))


def _parts(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, dict):
        for key, value in list(thing.items()):
            yield f"{path}[{key!r}]", value
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        for index, value in enumerate(thing):
            yield f"{path}[{index}]", value
    elif isinstance(thing, functools.partial):
        yield f"{path}.func", thing.func
        yield f"{path}.args", thing.args
        yield f"{path}.keywords", thing.keywords
    elif isinstance(thing, types.MethodType):
        yield f"{path}.__self__", thing.__self__
        yield f"{path}.__func__", thing.__func__
    elif isinstance(thing, (types.BuiltinMethodType, types.MethodWrapperType)):
        yield f"{path}.__self__", thing.__self__
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            yield f"{path}<{name}>", _contents(cell)
        yield f"{path}.__defaults__", thing.__defaults__
        yield f"{path}.__kwdefaults__", thing.__kwdefaults__
    yield from _attributes(path, thing)  # also of a list, a dict or a function: subclasses and decorators set them


def _attributes(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{path}." if path else ""
    if isinstance(thing, torch.nn.Module):
        for group in (thing._parameters, thing._buffers, thing._modules):
            for name, value in list(group.items()):
                yield prefix + name, value
    for name, value in list(getattr(thing, "__dict__", {}).items()):
        if name not in ("_parameters", "_buffers", "_modules"):
            yield prefix + str(name), value
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                mangled = f"_{cls.__name__.lstrip('_')}{name}" if private else name
                yield prefix + name, getattr(thing, mangled, None)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
