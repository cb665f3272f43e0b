"""wooly for transformers: ``from_pretrained(..., device_map="wooly")``. Importing this module makes it known.

What is public is what :data:`__all__` names.

Raises :class:`shared_store.base.errors.ConfigError` when imported beside a transformers that it does not fit.
"""

from __future__ import annotations

from wooly_hf import compat, guards, loading
from wooly_hf.sharing import Stats, stats, unshare

__all__ = ["Stats", "stats", "unshare"]


def _activate() -> None:
    compat.check()
    compat.replace("from_pretrained", loading.wrap_from_pretrained)
    compat.replace("_load_pretrained_model", loading.wrap_load)
    compat.replace_distributed(loading.wrap_distributed)
    compat.replace_warmup(loading.wrap_warmup)
    guards.install()


_activate()
