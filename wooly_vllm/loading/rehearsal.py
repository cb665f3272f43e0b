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


def fingerprints(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The fingerprints of some layers of a model, by path."""
    if not layers:  # of most models there is nothing to look at
        return {}
    named = {key for held in named_tensors(model) if (key := storage_key(held.tensor)) is not None}
    known = _Known(named, {id(module) for module in model.modules()})
    return {path: _fingerprint(layer, known) for path, layer in layers.items()}


def check(model: nn.Module, layers: Mapping[str, nn.Module], published: Fingerprints) -> None:
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
    and modules outside of the model, what they hold. An object that hides what it holds makes a fingerprint like no
    other. Left out: what belongs to a process (devices' numbers), and vLLM's configuration, which is part of the weight
    key.
    """
    own = {name: value for name, value in vars(layer).items() if name not in _EVERY_MODULES}
    logger = compat.logger()
    tell = logger.isEnabledFor(logging.DEBUG)
    digest = hashlib.sha256()
    for line in _Reading(known).lines("", own):
        digest.update(line.encode() + b"\n")
        if tell:  # where two differ, two logs say in what
            logger.debug("wooly: kernel state: %s", line)
    return digest.hexdigest()


_EVERY_MODULES = frozenset(vars(nn.Module()))


class _Reading:
    """One walk through what a layer holds."""

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._seen: dict[int, Any] = {}  # with the things: one made on the way must not leave its id to the next
        self._slots: Slots = {}

    def lines(self, path: str, thing: Any) -> Iterator[str]:
        """A line for each thing that is reached, with the way to it."""
        leaf = self._leaf(thing)
        if leaf is not None:
            yield f"{path} {leaf}"
        elif id(thing) not in self._seen:
            self._seen[id(thing)] = thing
            hidden = f" hides what it holds, process {os.getpid()} {secrets.token_hex()}" if hides(thing) else ""
            yield f"{path} {_name(type(thing))} {getattr(thing, '__qualname__', '')}{hidden}"
            for how, part in self._parts(thing):
                yield from self.lines(path + how, part)

    def _leaf(self, thing: Any) -> str | None:
        """What has no parts, or none to look into, as text; None for everything else."""
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
        """By how they are written. What decorators note on a function is about its code."""
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
