"""The canary over all random models: what engines write to after loading, in `results/canary.json`.

    python benchmarks/bench_canary.py [--families REGEX]

One engine after the other, as ``python -m wooly_vllm.canary`` runs it. A model that vLLM itself does not run on this
machine is in the result with the end of its error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
from bench_gpu import commit
from checkpoints import CACHE
from parity_rows import ROWS
from servers import CPU_ENVIRONMENT

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "canary.json"


def run(family: str, timeout_s: float) -> dict[str, Any]:
    """What the canary says of a family: storages ``watched``, those ``written`` to, and what ``failed`` if it did."""
    row = ROWS[f"{family}/none/bfloat16/eager"]
    settings = row.settings(on_gpu=False)
    command = [sys.executable, "-m", "wooly_vllm.canary", str(row.checkpoint(CACHE)), "--json"]
    if row.embeds:  # which generates no tokens: its warm-up is what is looked at
        command += ["--requests", "0"]
    done = subprocess.run(
        [*command, "--engine-args", json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **CPU_ENVIRONMENT},
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith('{"vllm"')]
    if not reports:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"failed": lines[-1].strip() if lines else f"exit code {done.returncode}"}
    report: dict[str, Any] = json.loads(reports[-1])
    return {
        "watched": report["watched"],
        "written": len(report["written"]),
        "would_be_shared": sum(one["would_be_shared"] for one in report["written"]),
        "raw": report["written"],
    }


def main() -> None:
    """Run the families, writing the results after each; those that are not run now keep what they had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=re.compile, default=re.compile(""), help="found in their names")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one family")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for family in filter(arguments.families.search, families.FAMILIES):
        try:
            found[family] = run(family, arguments.timeout_s)
        except subprocess.TimeoutExpired:
            found[family] = {"failed": f"not done after {arguments.timeout_s:.0f} s"}
        print(f"{family}: {json.dumps(found[family])}", flush=True)
        found["versions"] = {"commit": commit()}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
