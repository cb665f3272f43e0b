"""Backward passes as steps: one that follows a call of a model counts as a step, which begins in any case.

So a training step is held before its forward pass only, and nothing else begins while the pass runs.

Relies on autograd: a node calls its pre-hooks before it computes, and the engine calls queued callbacks when the whole
pass has ended, but not after an error. Then the pass counts until its thread calls a model again, or its graph is
freed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from wooly_hf.workload.turns import Turns


def watch(output: Any, turns: Turns) -> None:
    """Have backward passes through the output of a call count as steps."""
    hook = None
    for tensor in tensors_of(output):
        if (node := tensor.grad_fn) is not None:
            hook = hook or _Pass(turns)
            node.register_prehook(hook)


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in the output of a model."""
    parts: Iterable[Any] = ()
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    for part in parts:
        yield from tensors_of(part)


class _Pass:
    """A hook of the graph of one call. The graph has the only references to it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._running = False

    def __call__(self, _grads: Any) -> None:
        with self._lock:
            if self._running:
                return
            self._running = True
        self._turns.watch(self)
        self._turns.begin()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # as FSDP does

    def _end(self) -> None:
        try:
            self._turns.settle()
        finally:
            self.end()

    def end(self) -> None:
        """Count it as ended. Idempotent: where it was taken for one that failed, its end comes later."""
        with self._lock:
            ends, self._running = self._running, False
        if ends:
            self._turns.end()

    def __del__(self) -> None:
        """Count a pass that failed as ended. The collector may run in any thread, with any lock taken."""
        if self._running:
            self._turns.end_later()
