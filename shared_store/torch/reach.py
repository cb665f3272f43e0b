"""The tensors that a model reaches, also through plain objects that a state dict does not show.

Engines keep references in attention implementations, kernel objects, lists, dicts, closures and bound methods. They
must follow when a weight moves to shared memory. Otherwise they keep the old copy alive, or read a placeholder.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

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
EXACT_LEAVES = frozenset(_LEAVES)
"""Types of objects without parts that are not tensors."""

_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})  # modules have a dozen empty ones each


class Step(NamedTuple):
    """An object that was reached, from where, and how.

    Most steps lead to no tensor, so the path is formatted on demand.
    """

    before: Step | None
    how: str
    key: Any
    thing: Any

    @property
    def path(self) -> str:
        """The path from the model, as Python code would write it."""
        steps = [step.how.format(step.key) for step in self.way() if step.before is not None]
        return "".join(reversed(steps)).removeprefix(".")

    def way(self) -> Iterator[Step]:
        """Iterate over this step and those before it, back to the model."""
        step: Step | None = self
        while step is not None:
            yield step
            step = step.before


def tensors_from(root: torch.nn.Module) -> Iterator[tuple[Step, torch.Tensor]]:
    """Yield each tensor object once, with the first path to it.

    Looks into modules, containers, ``__dict__`` and ``__slots__``, closures, default arguments, partials and bound
    methods. Does not look into classes, Python modules, or objects of C code that do not show their parts.
    """
    steps = [Step(None, "", None, root)]  # keeps all alive: a temporary part must not pass its id to the next
    seen: set[int] = {id(root)}
    slots: Slots = {}
    for step in steps:  # grows on the way
        thing = step.thing
        if isinstance(thing, torch.Tensor):
            yield step, thing
        for how, group in parts(thing, slots):
            for key, part in group:
                kind = type(part)
                if kind in EXACT_LEAVES or id(part) in seen or (not part if kind in _CONTAINERS else False):
                    continue
                if not isinstance(part, _LEAVES):
                    seen.add(id(part))
                    steps.append(Step(step, how, key, part))


Groups: TypeAlias = Iterator[tuple[str, Iterable[tuple[Any, Any]]]]
"""Parts of an object: pairs of key and part, in groups with one format for the path."""

Slots: TypeAlias = dict[type, list[tuple[str, str]]]
"""Slots of types: the name in the source, and the (mangled) attribute."""


def parts(thing: Any, slots: Slots) -> Groups:
    """Yield the parts of an object, attributes included. ``slots``: a cache for all calls of one walk."""
    yield from contents(thing)
    # Lists, dicts and functions too: subclasses and decorators set attributes.
    own = getattr(thing, "__dict__", None)
    if own and isinstance(thing, torch.nn.Module):
        for group in (thing._parameters, thing._buffers, thing._modules):
            yield ".{}", list(group.items())
        own = {name: value for name, value in own.items() if name not in _MODULE_GROUPS}
    if own:
        yield ".{}", list(own.items())
    names = slots.get(type(thing))
    if names is None:
        names = slots[type(thing)] = _slots(type(thing))
    if names:
        yield ".{}", [(name, getattr(thing, attribute, None)) for name, attribute in names]


def contents(thing: Any) -> Groups:
    """Yield the contents of an object of a built-in type."""
    if isinstance(thing, dict):
        yield "[{!r}]", list(thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield "[{}]", enumerate(list(thing))
    elif isinstance(thing, functools.partial):
        yield ".{}", (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    elif isinstance(thing, types.MethodType):
        yield ".{}", (("__self__", thing.__self__), ("__func__", thing.__func__))
    elif isinstance(thing, (types.BuiltinMethodType, types.MethodWrapperType)):
        yield ".{}", (("__self__", thing.__self__),)
    elif isinstance(thing, types.FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield "<{}>", [(name, _in_cell(cell)) for name, cell in cells]
        yield ".{}", (("__defaults__", thing.__defaults__), ("__kwdefaults__", thing.__kwdefaults__))


def hides(thing: Any) -> bool:
    """Return True if an object may have parts in C code that :func:`parts` cannot see."""
    shown = isinstance(thing, _PYTHONS_OWN) or hasattr(thing, "__dict__")
    return not shown and not any("__slots__" in vars(base) for base in type(thing).__mro__)


_PYTHONS_OWN = (
    *(dict, list, tuple, set, frozenset, deque, functools.partial),
    *(types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, types.FunctionType),
)
"""Types whose parts :func:`contents` knows."""

_MODULE_GROUPS = frozenset({"_parameters", "_buffers", "_modules"})


def _slots(cls: type) -> list[tuple[str, str]]:
    """Return a class's slots: the name in the source, and the attribute."""
    found = []
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                found.append((name, f"_{base.__name__.lstrip('_')}{name}" if private else name))
    return found


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
