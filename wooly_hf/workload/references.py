"""References to shared weights from outside of a model's modules: with one of them the memory must stay.

While the memory is away, other registers stand in for those of the modules (:mod:`wooly_hf.absent`), so that nothing
gets a tensor from them. A tensor that was taken before is one reference more than the registers have: a variable, an
optimizer, a state dict, a view, a NumPy array, a graph of autograd, a call that another thread is in.

Relies on the counts of references of Python objects, of torch's tensors and of its storages. What a count should be is
measured on a module of its own, in the same way.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from types import FrameType
from typing import Any, Final, NamedTuple

import torch

from wooly_hf.absent import AbsentTensors

_SHOWN: Final = 3
"""Kinds of objects that a reason names."""

IsShared = Callable[[torch.Tensor], bool]


class WeakStorage:
    """A storage that is not kept alive.

    Attributes:
        number: identifies it among those that are alive.
    """

    _free = staticmethod(torch.UntypedStorage._free_weak_ref)  # also at the end of the process

    def __init__(self, storage: torch.UntypedStorage) -> None:
        """Refer to a storage."""
        self.number = int(storage._cdata)
        self._weak: Any = storage._weak_ref()

    def __del__(self) -> None:
        self._free(self._weak)  # type: ignore[no-untyped-call, unused-ignore]  # torch's, typed in some versions

    @property
    def alive(self) -> bool:
        """Whether a tensor has this storage."""
        return not torch.UntypedStorage._expired(self._weak)

    @property
    def uses(self) -> int:
        """References to it, while it is alive."""
        return int(torch._C._storage_Use_Count(self._weak))


class _Counts(NamedTuple):
    """References to one tensor: of Python and of torch; and to its storage."""

    tensor: torch.Tensor
    occurrences: int
    python: int
    torch: int
    storage: int


def references_elsewhere(
    registers: Collection[AbsentTensors], is_shared: IsShared, storages: Collection[WeakStorage]
) -> str:
    """Return what refers to shared tensors beside the registers that stand in; empty if nothing does.

    Args:
        registers: of all modules with shared tensors.
        is_shared: tells whether a tensor is shared.
        storages: all that lie in shared memory, as far as they are alive.
    """
    found = _elsewhere(registers, is_shared, storages)
    if found:
        gc.collect()  # cycles that nothing else refers to
        found = _elsewhere(registers, is_shared, storages)
    return found


def _elsewhere(registers: Collection[AbsentTensors], is_shared: IsShared, storages: Collection[WeakStorage]) -> str:
    usual = _usual()
    if any(number > usual.register for number in _counts_of_registers(registers)):
        return "a view of a module's parameters or buffers"
    counts = _counts(registers, is_shared)
    for found in counts:
        python = usual.python + usual.python_again * (found.occurrences - 1)
        if found.python > python or found.torch > usual.torch or found.storage > usual.storage:
            return _described(found.tensor, registers, counts)
    tensors = Counter(found.tensor.untyped_storage()._cdata for found in counts)
    for storage in storages:
        if storage.alive:
            if storage.number not in tensors:
                return "a part that the model does not have any more"
            if storage.uses > tensors[storage.number] + usual.storage_uses:
                return "another tensor over the same memory, such as a view, a state dict or a NumPy array"
    return ""


def _counts_of_registers(registers: Collection[AbsentTensors]) -> list[int]:
    return [sys.getrefcount(register.register) for register in registers]


def _counts(registers: Collection[AbsentTensors], is_shared: IsShared) -> list[_Counts]:
    """Count the references to each shared tensor."""
    occurrences: Counter[int] = Counter()
    tensors: list[torch.Tensor] = []
    for register in registers:
        for tensor in dict.values(register):
            if isinstance(tensor, torch.Tensor) and is_shared(tensor):
                if not occurrences[id(tensor)]:
                    tensors.append(tensor)
                occurrences[id(tensor)] += 1
        tensor = None
    return [
        _Counts(one, occurrences[id(one)], sys.getrefcount(one), _uses(one), sys.getrefcount(one.untyped_storage()))
        for one in tensors
    ]


def countable() -> bool:
    """Whether this torch tells the references to tensors and storages."""
    return hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")


def _uses(tensor: Any) -> int:
    """Return the references of C++ code to a tensor, and of its Python object."""
    return int(tensor._use_count())


class _Usual(NamedTuple):
    """References to a register, to a tensor that occurs once or once more, and to a storage without its tensors."""

    register: int
    python: int
    python_again: int
    torch: int
    storage: int
    storage_uses: int


@functools.cache
def _usual() -> _Usual:
    """Return the counts where nothing refers to a tensor but registers."""

    def probe(*names: str) -> list[AbsentTensors]:
        one = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        return [AbsentTensors(dict.fromkeys(names, one), nullcontext)]

    once = _counts(probe("a"), lambda _: True)[0]
    twice = _counts(probe("a", "b"), lambda _: True)[0]
    (register,) = _counts_of_registers(probe("a"))
    uses = WeakStorage(once.tensor.untyped_storage()).uses
    return _Usual(register, once.python, twice.python - once.python, once.torch, once.storage, uses - 1)


def _described(tensor: torch.Tensor, registers: Collection[AbsentTensors], counts: list[_Counts]) -> str:
    """Name the kinds of objects that refer to a tensor."""
    own = {id(registers), id(counts)} | {id(register) for register in registers}
    own |= {id(register.register) for register in registers} | {id(found) for found in counts}
    kinds = [
        _kind(one)
        for one in gc.get_referrers(tensor)
        if id(one) not in own and not (isinstance(one, FrameType) and one.f_code.co_filename == __file__)
    ]
    shown = ", ".join(sorted(set(kinds))[:_SHOWN]) or "a graph of autograd, or a call in progress"
    return f"a reference to a tensor of shape {tuple(tensor.shape)} ({shown})"


def _kind(referrer: Any) -> str:
    if isinstance(referrer, FrameType):
        return f"a variable of {referrer.f_code.co_name}"
    if isinstance(referrer, Mapping):
        return "a dict"
    return f"a {type(referrer).__name__}"
