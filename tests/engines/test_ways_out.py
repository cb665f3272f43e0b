"""A model that cannot be shared is loaded the stock way, with one warning and a count, or raises the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engines import status_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_without_a_store_the_model_loads_the_stock_way_with_one_warning(engine: Any, checkpoint: Any) -> None:
    """No store, and autostart off: stock's answers, and one warning with the reason and the option."""
    path = checkpoint("llama")
    stock = engine(path)
    lonely = engine(path, load_format="wooly", lease=False, environment={"WOOLY_AUTOSTART": "0"})
    assert lonely.wait("answered")["tokens"] == stock.wait("answered")["tokens"]
    warnings = [line for line in lonely.log if "loaded the stock way" in line]
    assert len(warnings) == 1
    assert "store_unavailable" in warnings[0]
    assert '"fallback": false' in warnings[0]


def test_a_model_that_is_not_in_the_store_fails_with_mode_load(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """``mode: load`` never reads a checkpoint: the engine ends with the next step."""
    process = engine(checkpoint("llama"), load_format="wooly", extra={"mode": "load"})
    assert "start one that publishes it first" in process.wait("failed")["error"]
    assert process.finish() != 0
    assert status_of(runtime_dir).models == ()


def test_an_unknown_option_is_an_error_that_lists_the_valid_ones(engine: Any, checkpoint: Any) -> None:
    """A misspelt option ends the engine before it loads."""
    process = engine(checkpoint("llama"), load_format="wooly", extra={"modus": "auto"})
    error = process.wait("failed")["error"]
    for word in ("modus", "mode", "inner_load_format", "share_min_bytes"):
        assert word in error
