"""Fixtures of the tests with real engines on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.engine_fixtures import checkpoint, engine, module_runtime_dir, runtime_dir
from support.engines import CPU_SETTINGS, PRELOADED

__all__ = ["checkpoint", "engine", "module_runtime_dir", "runtime_dir"]


@pytest.fixture(scope="session", autouse=True)
def preloaded() -> None:
    """Import vLLM while the first test prepares itself."""
    PRELOADED.begin()


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """Let every engine, server and script that a test starts compute in one thread, wherever the kernel puts it.

    Threads meet after each operation. Where more of them compute than there are processors, most of the time is spent
    waiting for the one that does not run.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_SETTINGS.items():
            patch.setenv(name, value)
        yield
