"""The command of the parity matrix, with real engines: what it writes, and what it leaves as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import parity
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

EQUAL, NOT_RUN = "llama/none/float16/eager", "qwen2/none/bfloat16/eager"
QUANTIZED = "llama/gptq/bfloat16/eager"
KERNEL = "cpu_gemm_wna16"
"""What stock vLLM computes quantized layers with on a CPU; its build for CPUs without AVX-512 has none."""
FAILING = "llama/online-bitsandbytes/bfloat16/eager"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a file that had two rows when three others were run, of which vLLM cannot run one here.

    One of those that it had is in no table any more.
    """
    here = parity.machine()
    old = {"device": here.device, "driver": "", "versions": {"vllm": "0"}, "status": "failed", "reason": "old"}
    output = tmp_path_factory.mktemp("parity") / "parity.json"
    output.write_text(json.dumps({"raw": [{**old, "row": name} for name in (NOT_RUN, "no/such/row")]}))
    command = [sys.executable, parity.__file__, "--rows", f"^({EQUAL}|{QUANTIZED}|{FAILING})$", "--output", str(output)]
    # A script that imports its neighbours; wooly is not among them, so what is tested stays what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(output.read_text())
    rows: list[dict[str, Any]] = whole["raw"]
    assert whole["cpu"] == Counter(row["status"] for row in rows)
    return rows


def row_of(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in results if row["row"] == name)


def test_a_shared_model_is_equal_and_says_how_much_is_shared(results: Any) -> None:
    """Stock, publisher and reader answered alike; the facts of the run are with the result."""
    row = row_of(results, EQUAL)
    assert (row["status"], row["reason"]) == ("equal", "")
    assert row["shared_fraction"] > 0.99
    assert set(row["versions"]) == {"vllm", "torch", "transformers"}
    assert row["commit"]
    assert row["seconds"] > 0


def test_a_quantized_model_is_shared_wherever_stock_vllm_runs_it(results: Any) -> None:
    """It computes what stock does."""
    row = row_of(results, QUANTIZED)
    if row["status"] == "stock-failed":
        assert KERNEL in row["reason"]
        pytest.skip(f"stock vLLM has no {KERNEL} for this CPU")
    assert (row["status"], row["reason"]) == ("equal", "")
    assert row["shared_fraction"] > 0.99


def test_what_stock_vllm_does_not_run_is_a_result(results: Any) -> None:
    """The row is there, with the end of vLLM's error."""
    row = row_of(results, FAILING)
    assert row["status"] == "stock-failed"
    assert "bitsandbytes" in row["reason"]


def test_rows_that_did_not_run_keep_what_they_had(results: Any) -> None:
    """A cut run loses nothing; only what no longer is a row goes."""
    assert [row["reason"] for row in results if row["row"] == NOT_RUN] == ["old"]
    assert {row["row"] for row in results} == {EQUAL, QUANTIZED, FAILING, NOT_RUN}
