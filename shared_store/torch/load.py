"""What every engine's loader does around loading: show progress, tell what was not shared, keep the lease."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are another package

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session

SHARE_MIN_BYTES = 16 << 10
"""Tensors below this size are copied into the process: engines write to small ones."""

TIMEOUT_S = 1800.0
"""Seconds that another process may take to load the same model."""


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes, shown once there is something to show. Call it with bytes done; 0 is no known total."""
    with tqdm(desc=title, total=total or None, unit="B", unit_scale=True, unit_divisor=1024, delay=1.0) as bar:
        yield bar.update


def report_fallback(session: Session | None, name: str, error: WoolyError, log: logging.Logger) -> None:
    """Count in the store that a model is loaded the stock way, and end the connection."""
    if session is None:
        return
    try:
        session.report_fallback(name, f"{error.code}: {error}")
    except WoolyError as report_error:
        log.warning("wooly: the store could not be told: %s", report_error)
    finally:
        session.close()


def keep(session: Session, model: nn.Module) -> None:
    """The connection is the lease: it ends when the model does."""
    weakref.finalize(model, session.close)
