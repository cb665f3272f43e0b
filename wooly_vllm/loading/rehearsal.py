"""Rehearsal: run a layer's post-processing on zeros, to get the Python state that it leaves.

Post-processing does two things at once: it brings tensors into the form that a kernel requires, and makes the objects
that call the kernel. A reader has the tensors already. It allocates zeros for one layer at a time, runs vLLM's own
method on them, and then binds the shared tensors in place of the result. The method's objects refer to the shared
tensors from then on. At no time is more than one layer's memory allocated.

The result must not depend on values. So the tensors must be equal to the publisher's in name, dtype, shape and stride,
and all other state that the method left must be equal by value: see :func:`_fingerprint`.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import secrets
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.torch.bind import Binder
from shared_store.torch.reach import Slots, contents, hides, parts
from shared_store.torch.tensors import named_tensors
from shared_store.torch.views import StorageKey, storage_key
from wooly_vllm import compat
from wooly_vllm.loading.state import digest_of

Fingerprints = Mapping[str, str]
"""Fingerprints of layers by path."""


def rehearse(binder: Binder, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Run the methods of layers on zeros, and bind the layers.

    Raises:
        BindingError: a layer differs from the publisher's, or its method failed on zeros.
    """
    for layer in layers:
        binder.materialize(layer, device)
        method = compat.method_of(layer)
        try:
            compat.post_process_layer(method, layer, device)
        except Exception as error:  # a kernel's preparation may raise anything; stock loading is still possible
            raise BindingError(
                f"{type(method).__name__} could not be rehearsed: {type(error).__name__}: {error}"
            ) from error
        binder.bind_late(layer)


def fingerprints(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the fingerprints of some layers of a model, by path."""
    if not layers:  # as in most models
        return {}
    named = {key for held in named_tensors(model) if (key := storage_key(held.tensor)) is not None}
    known = _Known(named, {id(module) for module in model.modules()})
    return {path: _fingerprint(layer, known) for path, layer in layers.items()}


def check(model: nn.Module, layers: Mapping[str, nn.Module], published: Fingerprints) -> None:
    """Compare the fingerprints of layers with the publisher's.

    Raises:
        BindingError: they differ; the first layer is named.
    """
    found = fingerprints(model, layers)
    for path in sorted({*found, *published}):
        if found.get(path) != published.get(path):
            raise BindingError(f"the kernel state of {path} differs from the publisher's")


class _Known(NamedTuple):
    """Storages and modules that the manifest describes, and a fingerprint does not."""

    storages: set[StorageKey]
    modules: set[int]


def _fingerprint(layer: nn.Module, known: _Known) -> str:
    """Return a digest of the state that a layer's method left beside the layer's named tensors.

    It covers plain values, enumerations, types, and the bytes of unnamed tensors; also the contents of objects, of
    functions with their closures, and of modules outside of the model. An object that hides its contents makes the
    fingerprint unique. Left out are state of a process, such as device numbers, and vLLM's configuration, which is
    part of the weight key.
    """
    own = {name: value for name, value in vars(layer).items() if name not in _EVERY_MODULES}
    logger = compat.logger()
    debug = logger.isEnabledFor(logging.DEBUG)
    digest = hashlib.sha256()
    for line in _Reading(known).lines("", own):
        digest.update(line.encode() + b"\n")
        if debug:  # to compare the logs of two processes
            logger.debug("wooly: kernel state: %s", line)
    return digest.hexdigest()


_EVERY_MODULES = frozenset(vars(nn.Module()))


class _Reading:
    """One walk through a layer's state."""

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._seen: dict[int, Any] = {}  # keeps the objects: a temporary one must not pass its id to the next
        self._slots: Slots = {}

    def lines(self, path: str, thing: Any) -> Iterator[str]:
        """Yield a line for each object that is reached, with its path."""
        leaf = self._leaf(thing)
        if leaf is not None:
            yield f"{path} {leaf}"
        elif id(thing) not in self._seen:
            self._seen[id(thing)] = thing
            hidden = f" hides its contents, process {os.getpid()} {secrets.token_hex()}" if hides(thing) else ""
            yield f"{path} {_name(type(thing))} {getattr(thing, '__qualname__', '')}{hidden}"
            for how, part in self._parts(thing):
                yield from self.lines(path + how, part)

    def _leaf(self, thing: Any) -> str | None:
        """Return an object without parts, or without relevant ones, as text; None for all others."""
        if isinstance(thing, torch.Tensor):
            return self._tensor(thing)
        if isinstance(thing, (enum.Enum, type)):
            return str(thing)
        if isinstance(thing, (bool, int, float, complex, str, bytes, type(None), torch.dtype)):
            return repr(thing)
        if isinstance(thing, (set, frozenset)):
            return str(sorted(map(repr, thing)))
        if isinstance(thing, _PROCESS) or compat.is_configuration(thing) or id(thing) in self._known.modules:
            return _name(type(thing))
        return None

    def _parts(self, thing: Any) -> list[tuple[str, Any]]:
        """Return parts in order of their path. Attributes of functions are ignored: decorators set them, as code."""
        code = isinstance(thing, (types.FunctionType, types.MethodType))
        groups = contents(thing) if code else parts(thing, self._slots)
        found = ((how.format(key), part) for how, group in groups for key, part in group)
        return sorted(found, key=lambda pair: pair[0])

    def _tensor(self, tensor: torch.Tensor) -> str:
        look = f"{tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())}"
        key = storage_key(tensor)
        if key is None or key in self._known.storages or not tensor.numel():
            return look
        return f"{look} {digest_of(tensor).hex()}"


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
