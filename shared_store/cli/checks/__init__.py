"""The checks of ``wooly doctor``, one module a subject.

They import neither torch nor vLLM, and change nothing: no directory is created, no store is started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared_store.base.errors import ConfigError
from shared_store.cli.checks.catalog import catalog
from shared_store.cli.checks.check import Check
from shared_store.cli.checks.engines import plugin, transformers, vllm
from shared_store.cli.checks.environment import environment
from shared_store.cli.checks.gpu import gpu
from shared_store.cli.checks.host import file_limit, host_memory, python
from shared_store.cli.checks.mps import mps
from shared_store.cli.checks.store import runtime_directory, store
from shared_store.cli.checks.swap import swap_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Check", "run_all", "transformers", "vllm"]


def run_all(directory: Callable[[], Path]) -> list[Check]:
    """Run all checks. ``directory`` returns the runtime directory, or raises :class:`ConfigError`."""
    done = [python(), environment(), vllm(), plugin(), transformers(), gpu(), mps(), host_memory(), file_limit()]
    done += [swap_directory(), catalog()]
    try:
        found = directory()
    except ConfigError as error:
        return [*done, Check("runtime directory", "failed", str(error), "set WOOLY_RUNTIME_DIR to a directory")]
    return [*done, runtime_directory(found), store(found)]
