"""The functions that the GPU benchmark times exist under the names that it uses."""

from __future__ import annotations

import pytest

from benchmarks.harness.node import Node

IMPORT_TIMEOUT_S = 120


@pytest.mark.vllm
def test_watched_functions_exist() -> None:
    with Node() as node:
        node.launch("check", "check", {}).wait("imported", IMPORT_TIMEOUT_S)
