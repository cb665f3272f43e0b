"""The store is killed under engines that answer: they go on, and the next engine attaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.killed import kill_store_under_load

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_store_killed_under_load(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    kill_store_under_load(engine, checkpoint("smollm2"), runtime_dir)
