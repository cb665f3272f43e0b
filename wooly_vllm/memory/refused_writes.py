"""A pointer for whoever meets a refused write.

On a GPU shared weights are mapped read-only. A kernel that writes to them ends its engine with "an illegal memory
access was encountered", at some later call that waits for the GPU, and nothing in that text leads to the reason. Here
such errors get a note (PEP 678) that says what it may have been, and the log gets it once. Nothing else is changed, and
the note does not promise to be right: other defects look the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from wooly_vllm import compat

NOTE = (
    "wooly: weights shared by wooly are read-only on a GPU. If this engine's model writes to its weights, load it the "
    "stock way; see docs/shared-memory.md#writes"
)
_MARKS = ("illegal memory access", "error_illegal_address")


def install() -> None:
    """Have this process's GPU worker explain such errors. Idempotent."""
    for owner, name in compat.where_gpu_errors_show(imported_only=True):
        method = getattr(owner, name)
        if not getattr(method, "wooly_explains", False):
            setattr(owner, name, _explaining(method))


def explain(error: BaseException) -> None:
    """Add the note to an error that a refused write may have caused; it is logged with the first."""
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
