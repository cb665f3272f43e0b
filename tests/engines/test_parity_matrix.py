"""The command of the parity matrix, with real engines: the results that it writes, and those that it keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.machine import processor_name

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EQUAL, NOT_RUN = "llama/none/float16/eager", "qwen2/none/bfloat16/eager"
QUANTIZED = "llama/gptq/bfloat16/eager"
KERNEL = "cpu_gemm_wna16"
"""Stock vLLM's kernel for quantized layers on a CPU. Its build for CPUs without AVX-512 has none."""
FAILING = "llama/online-bitsandbytes/bfloat16/eager"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run three rows, one of which vLLM cannot run here, with a result file of two other rows; return all rows.

    One of the two other rows no longer exists in the matrix.
    """
    old = {"device": processor_name(), "driver": "", "versions": {"vllm": "0"}, "status": "failed", "reason": "old"}
    output = tmp_path_factory.mktemp("parity") / "parity.json"
    output.write_text(json.dumps({"raw": [{**old, "row": name} for name in (NOT_RUN, "no/such/row")]}))
    rows = f"^({EQUAL}|{QUANTIZED}|{FAILING})$"
    command = [sys.executable, str(BENCHMARKS), "parity", "--rows", rows, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(output.read_text())
    found: list[dict[str, Any]] = whole["raw"]
    assert whole["cpu"] == Counter(row["status"] for row in found)
    return found


def row_of(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in results if row["row"] == name)


def test_shared_model_is_equal_and_its_shared_fraction_is_known(results: Any) -> None:
    """Stock, publisher and reader give equal answers; the result has the facts of the run."""
    row = row_of(results, EQUAL)
    assert (row["status"], row["reason"]) == ("equal", "")
    assert row["shared_fraction"] > 0.99
    assert set(row["versions"]) == {"vllm", "torch", "transformers"}
    assert row["commit"]
    assert row["seconds"] > 0


def test_quantized_model_is_shared_if_stock_vllm_runs_it(results: Any) -> None:
    """Its answers equal stock vLLM's."""
    row = row_of(results, QUANTIZED)
    if row["status"] == "stock-failed":
        assert KERNEL in row["reason"]
        pytest.skip(f"stock vLLM has no {KERNEL} for this CPU")
    assert (row["status"], row["reason"]) == ("equal", "")
    assert row["shared_fraction"] > 0.99


def test_row_that_stock_vllm_does_not_run_is_a_result(results: Any) -> None:
    """The row has the last line of vLLM's error."""
    row = row_of(results, FAILING)
    assert row["status"] == "stock-failed"
    assert "bitsandbytes" in row["reason"]


def test_rows_that_did_not_run_keep_their_results(results: Any) -> None:
    """Only results of rows that no longer exist are dropped."""
    assert [row["reason"] for row in results if row["row"] == NOT_RUN] == ["old"]
    assert {row["row"] for row in results} == {EQUAL, QUANTIZED, FAILING, NOT_RUN}
