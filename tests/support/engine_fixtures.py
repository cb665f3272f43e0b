"""Private stores, checkpoints, and engines that never outlive their test: fixtures for all folders with engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import EngineProcess, private_store_directory
from support.models.cache import CACHE
from support.models.families import random_model
from support.models.smollm2 import smollm2


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The directory of a checkpoint by its family's name, or of ``smollm2``; kept between runs."""
    return lambda name: smollm2(CACHE) if name == "smollm2" else random_model(name, CACHE)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    yield from private_store_directory()


@pytest.fixture(scope="module")
def module_runtime_dir() -> Iterator[Path]:
    yield from private_store_directory()


@pytest.fixture
def engine(runtime_dir: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Start engines on a private store; whatever still runs in the end is killed."""
    started: list[EngineProcess] = []

    def start(*paths: Path, environment: dict[str, str] | None = None, **job: Any) -> EngineProcess:
        process = EngineProcess(runtime_dir, {"models": [str(path) for path in paths], **job}, **(environment or {}))
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.close()
