"""Tells :mod:`shared_store.memory.unmapping` of torch's graph captures, in every thread of the process.

The driver does not say whether a non-blocking stream is being captured, and torch says it of the current stream alone.
So the methods of ``torch.cuda.CUDAGraph`` are wrapped through which torch, its compiler and engines begin and end every
capture. Does not know of captures that other libraries begin on streams of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from shared_store.memory.unmapping import captures


def watch(graphs: type[Any] = torch.cuda.CUDAGraph) -> None:
    """Record the captures of a class of graphs from now on. Idempotent."""
    if getattr(graphs.capture_begin, "wooly", False):
        return
    graphs.capture_begin = _beginning(graphs.capture_begin)
    graphs.capture_end = _ending(graphs.capture_end)


def _beginning(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        captures.begin(self)
        try:
            return stock(self, *args, **kwargs)
        except BaseException:
            captures.end(self)
            raise

    capture_begin.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    return capture_begin


def _ending(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(self, *args, **kwargs)
        finally:
            captures.end(self)

    return capture_end
