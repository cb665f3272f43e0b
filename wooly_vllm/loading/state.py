"""Plain state that loading leaves on modules: flags and numbers that control how a model computes.

``load_weights`` and post-processing set such attributes: a draft model's ``has_own_lm_head``, or the rows of a packed
weight. A reader runs neither, so the manifest carries the changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from shared_store.base.digest import digest_at
from shared_store.base.errors import BindingError
from shared_store.torch.reach import Step, tensors_from
from shared_store.torch.tensors import named_tensors
from shared_store.torch.views import storage_key

Plain = dict[str, dict[str, Any]]
_TYPES = (bool, int, float, str, type(None))


def plain_state(model: nn.Module) -> Plain:
    """Return plain attributes by module path and name, including parameters and buffers that are None."""
    return {
        path: {
            name: value
            for name, value in (*vars(module).items(), *_unset(module))
            if isinstance(value, _TYPES) and name != "training" and value == value  # noqa: PLR0124 - not a NaN
        }
        for path, module in model.named_modules()
    }


def changes(before: Plain, after: Plain) -> Plain:
    """Return the entries of ``after`` that are new or different."""
    found = {
        path: {name: value for name, value in values.items() if not _same(before.get(path, {}), name, value)}
        for path, values in after.items()
    }
    return {path: values for path, values in found.items() if values}


def restore(model: nn.Module, state: Plain, *, but: Iterable[nn.Module] = ()) -> None:
    """Set attributes to the publisher's values.

    Args:
        model: the reader's.
        state: of the manifest.
        but: modules to leave alone.

    Raises:
        BindingError: the model lacks a module.
    """
    modules = dict(model.named_modules())
    left_alone = {id(module) for module in but}
    for path, values in state.items():
        if path not in modules:
            raise BindingError(f"the model has no module {path!r}, which has state in the manifest")
        if id(modules[path]) not in left_alone:
            for name, value in values.items():
                setattr(modules[path], name, value)


def _unset(module: nn.Module) -> Iterator[tuple[str, None]]:
    for group in (module._parameters, module._buffers):
        yield from ((name, None) for name, value in group.items() if value is None)


def _same(values: dict[str, Any], name: str, value: Any) -> bool:
    return name in values and type(values[name]) is type(value) and values[name] == value


class Unnamed:
    """Tensors that a model reaches, and no module names: in lists, dicts, plain objects.

    A manifest does not describe them. A reader's own constructor makes them, as the publisher's did. If *loading*
    changed or made one, a reader would lack it, and the model must not be shared.
    """

    def __init__(self, model: nn.Module) -> None:
        """Digest them before loading."""
        self._before = _unnamed(model)
        self._digests = {key: digest_of(tensor) for key, (_, tensor) in self._before.items()}

    def changed(self, model: nn.Module, remade: Iterable[object] = ()) -> list[str]:
        """Return the paths of those that are new, or whose bytes have changed.

        Args:
            model: the same one, loaded.
            remade: objects that a reader makes itself. They do not count, nor do tensors that are first reached
                through them.
        """
        theirs = {id(thing) for thing in remade}
        return [
            step.path
            for key, (step, tensor) in _unnamed(model).items()
            if (key not in self._before or digest_of(tensor) != self._digests[key])
            and not any(id(before.thing) in theirs for before in step.way())
        ]


def _unnamed(model: nn.Module) -> dict[int, tuple[Step, torch.Tensor]]:
    named = {storage_key(held.tensor) for held in named_tensors(model)}
    return {
        id(tensor): (step, tensor)
        for step, tensor in tensors_from(model)
        if tensor.numel() and storage_key(tensor) is not None and storage_key(tensor) not in named
    }


def digest_of(tensor: torch.Tensor) -> bytes:
    """Return the digest of a tensor's elements, on any device."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return digest_at(data.data_ptr(), data.numel())
