"""Host copies of a worker's shared weights, made ahead: the first departure from a GPU copies no weights.

A thread makes them once the worker is ready, after the last graph was captured. It takes nothing from others: the store
refuses copies that do not fit, and drops them when it needs their memory. On a CPU nothing is copied ahead: copies are
files, and a departure that never comes would have worn a disk.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from shared_store.base.errors import WoolyError
from shared_store.sleep.sleeper import Sleeper
from wooly_vllm import compat
from wooly_vllm.residency import shared_models
from wooly_vllm.residency.refusals import by_configuration
from wooly_vllm.sharing_loader import sharing_loader


def begin(worker: Any) -> None:
    """Begin to make host copies of a worker's models, in the background, unless its engine is never swapped out."""
    loader = sharing_loader(worker.vllm_config)
    if loader is None or torch.device(worker.device).type != "cuda":
        return
    if not loader.options.may_be_swapped or by_configuration(worker.vllm_config):
        return
    sleepers = shared_models.sleepers(worker)
    if sleepers:
        threading.Thread(target=_copy, args=(sleepers,), name="wooly-copies-ahead", daemon=True).start()


def _copy(sleepers: list[Sleeper]) -> None:
    for sleeper in sleepers:
        try:
            made = sleeper.copy_ahead()
        except WoolyError as error:
            compat.logger().info("wooly: no host copies ahead: %s [%s]", error, error.code)
            return
        if made:
            compat.logger().info("wooly: host copies of %.1f MiB of weights exist", sleeper.nbytes / 2**20)
