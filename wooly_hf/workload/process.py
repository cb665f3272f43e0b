"""The workload of this process: all models that ``from_pretrained(device_map="wooly")`` made in it, as one.

It joins the store when the first model is loaded, and ends with the last.
"""

from __future__ import annotations

import logging
import threading

import torch
from torch import nn

from shared_store.base.errors import ConfigError, ExclusiveError, WoolyError
from shared_store.base.workload_settings import WorkloadSettings
from wooly_hf.workload.workload import Workload

log = logging.getLogger(__name__)

_lock = threading.RLock()
_current: Workload | None = None


def current() -> Workload | None:
    """Return the workload of this process; None before it has joined, and in a forked child."""
    found = _current
    return found if found is not None and found.alive else None


def workload_of(model: nn.Module) -> Workload | None:
    """Return the workload that a shared model belongs to, also in a forked child; None for other modules."""
    found = _current
    return found if found is not None and found.has(model) else None


def joined(name: str, device: torch.device, settings: WorkloadSettings) -> Workload | None:
    """Return the workload of this process. It joins the store first, if it has not.

    Args:
        name: of the workload, where neither the settings nor the environment have one.
        device: of the model that is to be loaded.
        settings: from the arguments of ``from_pretrained``.

    Returns:
        The workload; None if no store can be reached, which the load reports.

    Raises:
        ConfigError: the settings are not those of the workload.
        ExclusiveError: another workload has the device for itself, or this one would, and others use it.
    """
    global _current  # noqa: PLW0603 - one workload a process
    with _lock:
        found = current()
        if found is not None:
            found.check(settings)
            return found
        made = Workload(name, device, settings, _close_empty)
        try:
            made.join()
        except (ConfigError, ExclusiveError):
            raise
        except WoolyError as error:
            log.debug("wooly: this process is no workload: %s [%s]", error, error.code)
            return None
        _current = made
        return made


def _close_empty(workload: Workload) -> None:
    global _current  # noqa: PLW0603 - one workload a process
    with _lock:
        if workload is _current and workload.empty:
            _current = None
            workload.close()
