"""wooly for transformers: ``from_pretrained(..., device_map="wooly")``. Importing this package enables it.

The public names are those of :data:`__all__`. Importing raises :class:`~shared_store.base.errors.ConfigError` if the
installed transformers is too old, or has moved a name that wooly relies on, and for an invalid ``WOOLY_MPS_PERCENT``.
"""

from __future__ import annotations

from shared_store.compute import mps
from wooly_hf import compat, guards, hooks
from wooly_hf.sharing import Stats, stats
from wooly_hf.workload import entrances
from wooly_hf.workload.unshare import unshare

__all__ = ["Stats", "stats", "unshare"]


def _activate() -> None:
    compat.check()
    mps.prepare()  # what a program does before it loads a model may start CUDA
    compat.replace("from_pretrained", hooks.wrap_from_pretrained)
    compat.replace("_load_pretrained_model", hooks.wrap_load)
    compat.replace_distributed(hooks.wrap_distributed)
    compat.replace_warmup(hooks.wrap_warmup)
    guards.install()
    entrances.install()


_activate()
