"""Check of NVIDIA GPUs and their driver, without CUDA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from shared_store.cli.checks.check import Check, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator

_DRIVER = Path("/proc/driver/nvidia/version")
_ADVICE = "check the driver: dmesg | grep -i nvrm"


def gpu() -> Check:
    """List the GPUs by ``nvidia-smi``, or by the driver's files where that is missing, as in some containers."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            done = run_tool(
                [tool, "--query-gpu=name,uuid,memory.total,driver_version", "--format=csv,noheader"], check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check("gpu", "warning", f"nvidia-smi does not answer: {error}", _ADVICE)
        if done.returncode == 0 and done.stdout.strip():
            return Check("gpu", "ok", "; ".join(done.stdout.strip().splitlines()))
        if _DRIVER.exists():
            lines = (done.stdout + done.stderr).strip().splitlines()
            return Check("gpu", "warning", f"nvidia-smi: {lines[0] if lines else 'no GPU'}", _ADVICE)
    if _DRIVER.exists():
        gpus = sorted(_gpus_by_driver())
        return Check("gpu", "ok", f"{_DRIVER.read_text().splitlines()[0].strip()}; GPUs: {', '.join(gpus) or 'none'}")
    return Check("gpu", "ok", "none, CPU only")


def _gpus_by_driver() -> Iterator[str]:
    for information in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        facts = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        yield f"{facts.get('Model', '').strip()} {facts.get('GPU UUID', '').strip()}"
