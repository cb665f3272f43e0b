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
import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
    return {path: _fingerprint(layer, named) for path, layer in layers}


def check(model: nn.Module, layers: Iterable[tuple[str, nn.Module]], published: Fingerprints) -> None:
    """Compare layers with the publisher's.

    Raises:
        BindingError: they differ; the first one that does is named.
    """
    found = fingerprints(model, layers)
    for path in sorted({*found, *published}):
        if found.get(path) != published.get(path):
            raise BindingError(f"the kernel of {path} came out in another state than where the model was published")


def _fingerprint(layer: nn.Module, named: set[StorageKey]) -> str:
    """A digest of what a layer's method left beside the layer's named tensors.

    Plain values, enumerations, types, and other tensors by their bytes; of objects, what they hold. Left out: what
    belongs to a process (devices' numbers, functions, vLLM's configuration, which is part of the weight key).
    """
    lines = hashlib.sha256()
    for line in _lines("", _roots(layer), named, set()):
        lines.update(line.encode() + b"\n")
    return lines.hexdigest()


def _roots(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in _EVERY_MODULES}


_EVERY_MODULES = frozenset(vars(nn.Module()))


def _lines(path: str, thing: Any, named: set[StorageKey], seen: set[int]) -> Iterator[str]:
    leaf = _leaf(thing, named)
    if leaf is not None:
        yield f"{path} {leaf}"
    elif id(thing) not in seen:
        seen.add(id(thing))
        yield f"{path} {_name(type(thing))}"
        for how, part in _parts(thing):
            yield from _lines(path + how, part, named, seen)


def _leaf(thing: Any, named: set[StorageKey]) -> str | None:
    """What has no parts, as text; None for what has."""
    if isinstance(thing, torch.Tensor):
        return _tensor(thing, named)
    if isinstance(thing, (enum.Enum, type)):
        return str(thing)
    if isinstance(thing, (bool, int, float, complex, str, bytes, type(None), torch.dtype)):
        return repr(thing)
    if isinstance(thing, (set, frozenset)):
        return str(sorted(map(repr, thing)))
    if isinstance(thing, _PROCESS) or type(thing).__module__.startswith(_CONFIGURATION):
        return _name(type(thing))
    return None


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((f"[{key!r}]", thing[key]) for key in sorted(thing, key=repr))
    elif isinstance(thing, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(thing))
    yield from ((f".{name}", part) for name, part in sorted(getattr(thing, "__dict__", {}).items()))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


_PROCESS = (torch.device, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, nn.Module)
_CONFIGURATION = ("vllm.config", "vllm.distributed", "torch.distributed", "transformers.")


def _tensor(tensor: torch.Tensor, named: set[StorageKey]) -> str:
    look = f"{tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())}"
    key = storage_key(tensor)
    if key is None or key in named or not tensor.numel():
        return look
    return f"{look} {digest_of(tensor).hex()}"
