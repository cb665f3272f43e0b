"""The canary over all random models: writes to weights after loading, in ``results/canary.json``.

    python benchmarks canary [--families REGEX] [--lanes 4 --devices 0,1]

Runs ``python -m wooly_vllm.canary``; on a GPU, with CUDA graphs. For a model that vLLM itself does not run on this
machine, the result has the end of the error.
"""

from __future__ import annotations

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

from support.models import families
from support.models.cache import CACHE
from support.servers import CPU_ENVIRONMENT

from benchmarks.harness.arguments import add_lanes, devices_of_lanes, parser
from benchmarks.harness.machine import commit
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.parity.machine import Machine, machine
from benchmarks.parity.rows import ROWS


def run(family: str, models: Path, device: str | None, timeout_s: float) -> dict[str, Any]:
    """Run the canary on a family.

    Args:
        family: Name of a random model.
        models: Directory of the checkpoints.
        device: GPU as in ``CUDA_VISIBLE_DEVICES``; None on a CPU.
        timeout_s: Limit in seconds.

    Returns:
        ``watched`` and ``written`` storages and more, or the error as ``failed``.

    Raises:
        subprocess.TimeoutExpired: It took too long.
    """
    graphs = device is not None and not families.FAMILIES[family].embeds
    row = ROWS[f"{family}/none/bfloat16/{'graphs' if graphs else 'eager'}"]
    settings = row.settings(on_gpu=device is not None)
    environment = {**os.environ, **CPU_ENVIRONMENT}
    if graphs:  # without compiled code: compiling takes longest and does not change writes
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
    """The result file, by device and family. Families that do not run keep their results."""

    def __init__(self, file: Path, here: Machine) -> None:
        self._file, self._machine, self._lock = file, here, threading.Lock()

    def put(self, family: str, result: dict[str, Any]) -> None:
        """Store and print a result."""
        with self._lock:
            found = read(self._file)
            here = found.setdefault(self._machine.device, {})
            here[family] = {"commit": commit(), "driver": self._machine.driver, **result}
            write(self._file, found, sort_keys=True)
        print(f"{family}: {json.dumps(result)}", flush=True)


def main() -> None:
    """Run the families in lanes, and store each result when it is known."""
    options = parser(__doc__)
    options.add_argument(
        "--families", type=re.compile, default=re.compile(""), metavar="REGEX", help="pattern of names (default: all)"
    )
    add_lanes(options, "engines that run at the same time (default 1)")
    options.add_argument("--models", type=Path, default=CACHE, help="directory of the checkpoints")
    options.add_argument("--timeout-s", type=float, default=300, help="limit for one family, in seconds (default 300)")
    options.add_argument(
        "--out", type=Path, default=RESULTS / "canary.json", help="result file (default benchmarks/results/canary.json)"
    )
    arguments = options.parse_args()
    here = machine()
    results = Results(arguments.out, here)
    names = list(filter(arguments.families.search, families.FAMILIES))
    for family in names:
        families.random_model(family, arguments.models)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices_of_lanes(arguments):
        free.put(device)

    def look(family: str) -> None:
        device = free.get()
        try:
            result = run(family, arguments.models, device if here.on_gpu else None, arguments.timeout_s)
        except subprocess.TimeoutExpired:
            result = {"failed": f"not done after {arguments.timeout_s:.0f} s"}
        finally:
            free.put(device)
        results.put(family, result)

    with concurrent.futures.ThreadPoolExecutor(arguments.lanes) as lanes:
        list(lanes.map(look, names))
