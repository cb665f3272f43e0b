"""A note for errors that a write to shared weights may have caused.

On a GPU, shared weights are mapped read-only. A kernel that writes to them crashes its engine with "an illegal memory
access was encountered", raised by a later call that synchronises with the GPU. The message does not lead to the cause.
This module adds a note (PEP 678) with the possible cause to such errors, and logs it once. The note is a hint: other
defects raise the same error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from wooly_vllm import compat

NOTE = (
    "wooly: shared weights are read-only on a GPU, and a write to them raises this error. If the model writes to its "
    "weights, load it the stock way; see docs/shared-memory.md#writes"
)
_MARKS = ("illegal memory access", "error_illegal_address")


def install() -> None:
    """Make this process's GPU worker explain such errors. Idempotent."""
    for owner, name in compat.methods_that_synchronize(imported_only=True):
        method = getattr(owner, name)
        if not getattr(method, "wooly_explains", False):
            setattr(owner, name, _explaining(method))


def explain(error: BaseException) -> None:
    """Add the note to an error that a refused write may have caused, and log it the first time."""
    text = str(error).lower()
    if NOTE in getattr(error, "__notes__", ()) or not any(mark in text for mark in _MARKS):
        return
    error.add_note(NOTE)
    _log_once()


@functools.cache
def _log_once() -> None:
    compat.logger().error(NOTE)


def _explaining(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            explain(error)
            raise

    wrapper.wooly_explains = True  # type: ignore[attr-defined]
    return wrapper
