"""Plain state that loading leaves on modules: flags and numbers that decide how a model computes.

``load_weights`` and post-processing set such attributes (a draft model's ``has_own_lm_head``, the rows of a packed
weight). A reader runs neither, so what changed at the publisher travels in the manifest.
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
    """Plain attributes by module path and name; a parameter or buffer that is None is one too."""
    return {
        path: {
            name: value
            for name, value in (*vars(module).items(), *_unset(module))
            if isinstance(value, _TYPES) and name != "training" and value == value  # noqa: PLR0124 - not a NaN
        }
        for path, module in model.named_modules()
    }


def changes(before: Plain, after: Plain) -> Plain:
    """What is new or different in ``after``."""
    found = {
        path: {name: value for name, value in values.items() if not _same(before.get(path, {}), name, value)}
        for path, values in after.items()
    }
    return {path: values for path, values in found.items() if values}


def restore(model: nn.Module, state: Plain, *, but: Iterable[nn.Module] = ()) -> None:
    """Set attributes to what the publisher had, ``but`` for some modules.

    Raises:
        BindingError: a module is missing.
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
    """Tensors that a model reaches, but that no module names: in lists, dicts, plain objects.

    They are not in a manifest. A reader's own constructor makes them, as the publisher's did; if *loading* then changed
    one, or made one, a reader would not have it, and the model must not be shared.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember them as they are before loading."""
        self._before = _unnamed(model)
        self._digests = {key: digest_of(tensor) for key, (_, tensor) in self._before.items()}

    def changed(self, model: nn.Module, remade: Iterable[object] = ()) -> list[str]:
        """Paths of those that are new, or have other bytes, since this object was made.

        ``remade``: what a reader makes itself, with all that is only reached through it, does not count.
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
    """The digest of a tensor's elements, wherever they lie."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return digest_at(data.data_ptr(), data.numel())
