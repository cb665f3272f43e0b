"""Run the example of a prefill and a decode engine, on CPUs and GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "prefill_decode.py"
ENGINE: dict[str, Any] = {"max_model_len": 320, "max_num_seqs": 4, "dtype": "bfloat16", "seed": 0}


def decode_goes_on_from_prefill(path: Path, runtime_dir: Path, settings: dict[str, Any]) -> None:
    """The answers equal those of a single engine, the KV cache was handed over, and the weights are in memory once."""
    command = [sys.executable, str(EXAMPLE), str(path), "--check", "--json"]
    run = subprocess.run(
        [*command, "--engine-args", json.dumps(ENGINE | settings)],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        env={**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir), "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["alike"]
    assert result["kv_taken_over"]
    assert result["kv_files"] == 2 * len(result["answers"])  # the model has two layers
    ((name, weights),) = result["weights"].items()
    assert name == str(path)
    assert weights["readers"] == 3
