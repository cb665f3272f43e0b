"""The entrances to a model: hooks of the module that ``from_pretrained`` returned, and wrappers of its methods.

Each enters the gate. A call is a step, ``generate`` is work in steps. Parts that compute a whole pass without a call of
the module around them have hooks of their own: the base model, as wrappers such as PEFT's call the ``forward`` of the
module around it, without its hooks; and the encoder, which ``generate`` calls by itself. Everything else that reaches a
tensor through a module is caught by the module's registers, see :mod:`wooly_hf.absent`; entrances let the store know
that the model is used, and keep it for as long as that takes.

Relies on torch: it calls a module's hooks outside of compiled code, and ``__reduce_ex__`` of a hook when a module is
copied or pickled. A copy has memory of its own, so its hooks do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from wooly_hf import compat
from wooly_hf.workload import backward
from wooly_hf.workload.gate import Use
from wooly_hf.workload.process import current, workload_of
from wooly_hf.workload.workload import Workload

_CALLS: Final = nn.Module._call_impl.__code__.co_filename
_NOTHING: Final = (getattr, (contextlib.nullcontext(), "__exit__"))
"""What a hook is in a copy of its module: a callable of the standard library that takes anything and returns None."""

_GRAD: Final = "an output of its model required grad, so a backward pass may follow"


def install() -> None:
    """Wrap the methods of models that use or replace many tensors."""
    for name in ("save_pretrained", "state_dict"):
        compat.wrap_method(name, _using_it)
    for name in ("_apply", "load_adapter", "add_adapter", "resize_token_embeddings"):
        compat.wrap_method(name, _changing_it)


def watch_graphs(graphs: type[Any] = torch.cuda.CUDAGraph) -> None:
    """Have replays of a class of graphs enter the gate: a graph has addresses of weights. Idempotent."""
    stock = graphs.replay
    if getattr(stock, "wooly", False):
        return

    @functools.wraps(stock)
    def replay(self: Any) -> Any:
        workload = current()
        with contextlib.nullcontext() if workload is None else workload.gate.using(Use.STEP):
            return stock(self)

    replay.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    graphs.replay = replay


def guard(model: nn.Module, workload: Workload, *, leaves: bool) -> None:
    """Have all uses of a model enter the gate of its workload.

    Args:
        model: as ``from_pretrained`` returns it.
        workload: of this process.
        leaves: whether the model may leave its device. Else compiled code skips the hooks, so that a caller of the
            model can be compiled as one graph.
    """
    watch_graphs()
    before, after = (_Before, _After) if leaves else (_BeforeUnlessCompiled, _AfterUnlessCompiled)
    model.register_forward_pre_hook(before(workload), prepend=True)
    model.register_forward_hook(after(workload), always_call=True)
    for part in compat.parts_called_alone(model):
        part.register_forward_pre_hook(_BeforeUnlessCompiled(workload, inner=True), prepend=True)
        part.register_forward_hook(_AfterUnlessCompiled(workload), always_call=True)
    for cls in type(model).__mro__:
        if "generate" in vars(cls):
            _wrap(cls, "generate")


def _using_it(stock: Callable[..., Any], use: Use = Use.WEIGHTS) -> Callable[..., Any]:
    """Wrap a method of a model, which is in use until the method ends."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _using(self, use):
            return stock(self, *args, **kwargs)

    method.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    return method


def _changing_it(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that replaces tensors of a model."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _using(self):
            result = stock(self, *args, **kwargs)
        if (workload := workload_of(self)) is not None:
            workload.measure(self)
        return result

    method.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    return method


def _wrap(cls: Any, name: str) -> None:
    if not getattr(vars(cls)[name], "wooly", False):
        setattr(cls, name, _using_it(vars(cls)[name], Use.WORK))


def _using(model: Any, use: Use = Use.WEIGHTS) -> AbstractContextManager[None]:
    workload = workload_of(model) if isinstance(model, nn.Module) else None
    return contextlib.nullcontext() if workload is None else workload.gate.using(use)


def _outside_of_compiled_code(hook: Callable[..., None]) -> Callable[..., None]:
    """Let torch's compiler run a hook as it is, and what it calls."""
    wrapped: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch's
    return wrapped


class _Before:
    """The hook before a call of the model. ``inner``: the module is called inside of calls of another one, too."""

    def __init__(self, workload: Workload, *, inner: bool = False) -> None:
        self._workload = workload
        self._inner = inner

    @_outside_of_compiled_code
    def __call__(self, module: nn.Module, _args: Any) -> None:
        self._enter(module)

    def _enter(self, module: nn.Module) -> None:
        gate = self._workload.gate
        if not (self._inner and gate.stepping):
            gate.enter(id(module), _frame_of_call(), Use.STEP)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _NOTHING


class _BeforeUnlessCompiled(_Before):
    """The same, which compiled code skips."""

    def __call__(self, module: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._enter(module)


class _After:
    """The hook after a call of the model, also if it raised."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    @_outside_of_compiled_code
    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        self._leave(module, output)

    def _leave(self, module: nn.Module, output: Any) -> None:
        workload = self._workload
        ended = workload.gate.leave(id(module))
        if not workload.refusal and any(tensor.requires_grad for tensor in backward.tensors_of(output)):
            workload.refuse(_GRAD)
        if ended and torch.is_grad_enabled():
            backward.watch(output, workload.turns)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _NOTHING


class _AfterUnlessCompiled(_After):
    """The same, which compiled code skips."""

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._leave(module, output)


def _frame_of_call() -> FrameType | None:
    """Return the frame of ``Module.__call__`` that calls a hook."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CALLS:
        frame = frame.f_back
    return frame
