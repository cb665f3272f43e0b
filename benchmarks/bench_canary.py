"""The canary over all random models: what engines write to after loading, in `results/canary.json`.

    python benchmarks/bench_canary.py [--families REGEX] [--lanes 4 --devices 0,1]

Engines as ``python -m wooly_vllm.canary`` runs them; on a GPU with CUDA graphs. A model that vLLM itself does not run
on this machine is in the result with the end of its error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import families
import parity
from bench_gpu import commit
from checkpoints import CACHE
from parity_rows import ROWS
from servers import CPU_ENVIRONMENT

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "canary.json"


def run(family: str, models: Path, device: str | None, timeout_s: float) -> dict[str, Any]:
    """What the canary says of a family: storages ``watched``, those ``written`` to, and what ``failed`` if it did.

    ``device``: as ``CUDA_VISIBLE_DEVICES`` names it; None where there is no GPU.
    """
    graphs = device is not None and not families.FAMILIES[family].embeds
    row = ROWS[f"{family}/none/bfloat16/{'graphs' if graphs else 'eager'}"]
    settings = row.settings(on_gpu=device is not None)
    environment = {**os.environ, **CPU_ENVIRONMENT}
    if graphs:  # of code that is not compiled: compiling takes longest, and changes no write
        settings["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "wooly_vllm.canary", str(row.checkpoint(models)), "--json"]
    done = subprocess.run(
        [*command, "--engine-args", json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment,
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith('{"vllm"')]
    if not reports:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        last = max((number for number, line in enumerate(lines) if "Error" in line), default=None)
        return {"failed": f"exit code {done.returncode}" if last is None else " ".join(lines[last : last + 2])}
    report: dict[str, Any] = json.loads(reports[-1])
    return {
        "vllm": report["vllm"],
        "watched": report["watched"],
        "written": len(report["written"]),
        "would_be_shared": sum(one["would_be_shared"] for one in report["written"]),
        "raw": report["written"],
    }


class Results:
    """The file of results, by device and family; those that are not run now keep what they had."""

    def __init__(self, file: Path, machine: parity.Machine) -> None:
        self._file, self._machine, self._lock = file, machine, threading.Lock()

    def put(self, family: str, result: dict[str, Any]) -> None:
        """Write one down, and tell it."""
        with self._lock:
            found = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
            here = found.setdefault(self._machine.device, {})
            here[family] = {"commit": commit(), "driver": self._machine.driver, **result}
            self._file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{family}: {json.dumps(result)}", flush=True)


def main() -> None:
    """Run the families in lanes, writing each result down when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=re.compile, default=re.compile(""), help="found in their names")
    parser.add_argument("--lanes", type=int, default=1, help="engines at once")
    parser.add_argument(
        "--devices",
        default=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        help="GPUs that the lanes take in turn, as CUDA_VISIBLE_DEVICES names them, which they are by default",
    )
    parser.add_argument("--models", type=Path, default=CACHE, help="folder of the checkpoints")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one family")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    machine = parity.machine()
    results = Results(arguments.out, machine)
    names = list(filter(arguments.families.search, families.FAMILIES))
    for family in names:
        families.random_model(family, arguments.models)
    devices: queue.SimpleQueue[str] = queue.SimpleQueue()
    listed = arguments.devices.split(",")
    for number in range(arguments.lanes):
        devices.put(listed[number % len(listed)])

    def look(family: str) -> None:
        device = devices.get()
        try:
            result = run(family, arguments.models, device if machine.on_gpu else None, arguments.timeout_s)
        except subprocess.TimeoutExpired:
            result = {"failed": f"not done after {arguments.timeout_s:.0f} s"}
        finally:
            devices.put(device)
        results.put(family, result)

    with concurrent.futures.ThreadPoolExecutor(arguments.lanes) as lanes:
        list(lanes.map(look, names))


if __name__ == "__main__":
    main()
