"""Rehearsal: a layer's post-processing runs on memory without values, to come to the Python state that it leaves.

Post-processing does two things at once: it brings tensors into the form that a kernel wants, and makes the objects that
call the kernel. A reader has the tensors already. It gives one layer at a time memory, lets vLLM's own method work on
that, and then puts the shared tensors in the place of what came out: wherever the method's objects refer to a tensor,
they refer to the shared one from then on. Not more than one layer's worth of memory is taken at any time.

Nothing may depend on the values, which are zeros. So the tensors must come out alike in name, type, shape and stride,
and all else that the method left must be equal, value by value, to what the publisher has: see :func:`fingerprint`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shared_store.client.bind import Binder
from shared_store.client.tensors import named_tensors
from shared_store.client.views import StorageKey, storage_key
from shared_store.errors import BindingError
from wooly_vllm import compat
from wooly_vllm.state import digest_of

Fingerprints = Mapping[str, str]
"""Fingerprints of layers by their paths."""


def rehearse(binder: Binder, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Bring layers to the state that their methods leave, and bind them.

    Raises:
        BindingError: a layer came out unlike the publisher's, or its method failed on zeros.
    """
    for layer in layers:
        binder.materialize(layer, device)
        method = compat.method_of(layer)
        try:
            compat.post_process_layer(method, layer, device)
        except Exception as error:  # whatever a kernel's preparation does not take: the stock way is open
            raise BindingError(
                f"{type(method).__name__} could not be rehearsed: {type(error).__name__}: {error}"
            ) from error
        binder.bind_late(layer)


def fingerprints(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """The fingerprints of some layers of a model, by path."""
    named = {key for held in named_tensors(model) if (key := storage_key(held.tensor)) is not None}
    modules = {id(module) for module in model.modules()}
    return {path: _fingerprint(layer, _Known(named, modules)) for path, layer in layers}


def check(model: nn.Module, layers: Iterable[tuple[str, nn.Module]], published: Fingerprints) -> None:
    """Compare layers with the publisher's.

    Raises:
        BindingError: they differ; the first one that does is named.
    """
    found = fingerprints(model, layers)
    for path in sorted({*found, *published}):
        if found.get(path) != published.get(path):
            raise BindingError(f"the kernel of {path} came out in another state than where the model was published")


class _Known(NamedTuple):
    """What a fingerprint need not look into: the manifest has it."""

    storages: set[StorageKey]
    modules: set[int]


def _fingerprint(layer: nn.Module, known: _Known) -> str:
    """A digest of what a layer's method left beside the layer's named tensors.

    Plain values, enumerations, types, and other tensors by their bytes; of objects, also functions with their closures
    and modules outside of the model, what they hold. An object that hides what it holds makes a fingerprint that no
    other process has. Left out: what belongs to a process (devices' numbers), and vLLM's configuration, which is part
    of the weight key.
    """
    lines = hashlib.sha256()
    own = {name: value for name, value in vars(layer).items() if name not in _EVERY_MODULES}
    for line in _lines("", own, known, set()):
        lines.update(line.encode() + b"\n")
        compat.logger().debug("wooly: kernel state: %s", line)  # where two differ, two logs say in what
    return lines.hexdigest()


_EVERY_MODULES = frozenset(vars(nn.Module()))


def _lines(path: str, thing: Any, known: _Known, seen: set[int]) -> Iterator[str]:
    leaf = _leaf(thing, known)
    if leaf is not None:
        yield f"{path} {leaf}"
    elif id(thing) not in seen:
        seen.add(id(thing))
        parts = _parts(thing)
        hidden = "" if parts is not None else f" hides what it holds, process {os.getpid()}"
        yield f"{path} {_name(type(thing))}{hidden}"
        for how, part in parts or ():
            yield from _lines(path + how, part, known, seen)


def _leaf(thing: Any, known: _Known) -> str | None:
    """What has no parts, or none to look into, as text; None for everything else."""
    if isinstance(thing, torch.Tensor):
        return _tensor(thing, known)
    if isinstance(thing, (enum.Enum, type)):
        return str(thing)
    if isinstance(thing, (bool, int, float, complex, str, bytes, type(None), torch.dtype)):
        return repr(thing)
    if isinstance(thing, (set, frozenset)):
        return str(sorted(map(repr, thing)))
    if isinstance(thing, _PROCESS) or compat.is_configuration(thing) or id(thing) in known.modules:
        return _name(type(thing))
    return None


def _parts(thing: Any) -> list[tuple[str, Any]] | None:
    """What an object holds, by how it is written; None where that cannot be seen."""
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        return [("()", thing.__qualname__), ("<>", cells), ("=", [thing.__defaults__, thing.__kwdefaults__])]
    if isinstance(thing, types.MethodType):
        return [("()", thing.__qualname__), (".__self__", thing.__self__)]
    if isinstance(thing, functools.partial):
        return [(".func", thing.func), (".args", thing.args), (".keywords", thing.keywords)]
    found: list[tuple[str, Any]] = []
    if isinstance(thing, Mapping):
        found += ((f"[{key!r}]", thing[key]) for key in sorted(thing, key=repr))
    elif isinstance(thing, (list, tuple)):
        found += ((f"[{index}]", part) for index, part in enumerate(thing))
    elif not hasattr(thing, "__dict__") and not any("__slots__" in vars(base) for base in type(thing).__mro__):
        return None
    own = dict(getattr(thing, "__dict__", {}))
    slots = (name for base in type(thing).__mro__ for name in vars(base).get("__slots__", ()))
    own |= {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return found + [(f".{name}", part) for name, part in sorted(own.items())]


_PROCESS = (
    torch.device,
    torch.Stream,
    torch.Event,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensor(tensor: torch.Tensor, known: _Known) -> str:
    look = f"{tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())}"
    key = storage_key(tensor)
    if key is None or key in known.storages or not tensor.numel():
        return look
    return f"{look} {digest_of(tensor).hex()}"
