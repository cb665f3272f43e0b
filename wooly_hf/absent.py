"""Registers of tensors whose memory is away: a module's parameters or buffers, while its process is swapped out.

A module keeps its tensors in two dicts. While the memory of some of them is unmapped, :class:`AbsentTensors` stands in
their place: any access to a tensor through the module returns the memory first, and then goes on. So a submodule that
is called on its own, ``state_dict``, ``parameters()``, a copy or a PEFT layer works as ever, a little later.

Names are answered without that: they are no memory. While the memory is there, modules have their own dicts and pay
nothing. Does not know of tensors that are referred to from elsewhere, see :mod:`wooly_hf.workload.references`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from torch import nn

Register = dict[str, Any]
Passing = Callable[[], AbstractContextManager[None]]
"""A context in which the memory is there and does not leave. Entering it waits."""

REGISTERS: Final = ("_parameters", "_buffers")

_looking = threading.local()


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Let this thread look at tensor objects, and not at their memory, without returning it."""
    before = getattr(_looking, "now", False)
    _looking.now = True
    try:
        yield
    finally:
        _looking.now = before


class AbsentTensors(dict[str, Any]):
    """A register in the place of a module's own. Its content is for code in C, which reads dicts directly."""

    def __init__(self, register: Register, passing: Passing) -> None:
        """Stand in for ``register``; ``passing``: see :data:`Passing`."""
        super().__init__(register)
        self.register = register
        self._passing = passing

    def _present(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if getattr(_looking, "now", False) else self._passing()

    def items(self) -> Any:  # noqa: D102 - a dict's
        # A snapshot, not a view: it has references to all tensors, which keep the memory from leaving again.
        return self.copy().items()

    def values(self) -> Any:  # noqa: D102 - a dict's
        return self.copy().values()

    def copy(self) -> Register:  # noqa: D102 - a dict's
        with self._present():
            return dict(self.register)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.copy(),)


def _passing_on(name: str) -> Callable[..., Any]:
    def method(self: AbsentTensors, *args: Any, **kwargs: Any) -> Any:
        with self._present():
            return getattr(self.register, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _naming(name: str) -> Callable[..., Any]:
    def method(self: AbsentTensors, *args: Any) -> Any:
        return getattr(self.register, name)(*args)

    method.__name__ = name
    return method


_ACCESSES: Final = (
    *("__getitem__", "get", "pop", "popitem", "setdefault", "__eq__", "__ne__", "__or__", "__ror__", "__ior__"),
    *("__setitem__", "__delitem__", "update", "clear", "__repr__"),
)
for _name in _ACCESSES:
    setattr(AbsentTensors, _name, _passing_on(_name))
for _name in ("__contains__", "__iter__", "__len__", "__reversed__", "keys"):
    setattr(AbsentTensors, _name, _naming(_name))


class Absence:
    """The modules whose registers are replaced. Keeps no module alive."""

    def __init__(self, passing: Passing) -> None:
        """Replace nothing yet; ``passing``: see :data:`Passing`."""
        self._passing = passing
        self._replaced: list[tuple[weakref.ref[nn.Module], str]] = []

    def begin(self, modules: Iterable[nn.Module], away: Callable[[Any], bool]) -> None:
        """Replace each register of some modules that has a tensor for which ``away`` is true."""
        for module in modules:
            for name in REGISTERS:
                register = module.__dict__[name]
                if not isinstance(register, AbsentTensors) and any(map(away, register.values())):
                    module.__dict__[name] = AbsentTensors(register, self._passing)
                    self._replaced.append((weakref.ref(module), name))

    def end(self) -> None:
        """Give the modules their own registers again."""
        for found, name in self._replaced:
            module = found()
            if module is not None:
                register = module.__dict__[name]
                if isinstance(register, AbsentTensors):
                    module.__dict__[name] = register.register
        self._replaced.clear()

    def registers(self) -> Iterator[AbsentTensors]:
        """Yield the registers that stand in now."""
        for found, name in self._replaced:
            module = found()
            register = None if module is None else module.__dict__[name]
            if isinstance(register, AbsentTensors):
                yield register
