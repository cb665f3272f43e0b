"""The facts that a result file records: date, commit, machine, and versions of packages."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata

from support.machine import processor_name

import shared_store
from benchmarks.harness.gpu import nvidia_smi
from benchmarks.harness.processes import BENCHMARKS


def today() -> str:
    """Return the date in UTC, as ``YYYY-MM-DD``."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def commit() -> str:
    """Return the measured commit: ``WOOLY_COMMIT`` if set (for trees without git), else git's, else ``unknown``."""
    if given := os.environ.get("WOOLY_COMMIT"):
        return given
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=BENCHMARKS, check=False
    )
    return asked.stdout.strip() or "unknown"


def stamp() -> dict[str, str]:
    """Return date and commit."""
    return {"date": today(), "commit": commit()}


def host() -> dict[str, str]:
    """Return the CPU, the number of cores, and the version of Python."""
    return {"cpu": processor_name(), "cores": str(os.cpu_count()), "python": platform.python_version()}


def wooly() -> dict[str, str]:
    """Return the version of wooly."""
    return {"wooly": shared_store.__version__}


def packages(*names: str) -> dict[str, str]:
    """Return the versions of installed distributions, by name."""
    return {name: metadata.version(name) for name in names}


def gpu() -> dict[str, str]:
    """Return the GPU and its driver. Raises :class:`OSError` or :class:`subprocess.SubprocessError` without one."""
    return {"gpu": nvidia_smi("name"), "driver": nvidia_smi("driver_version")}


def gpu_stack() -> dict[str, str]:
    """Return the versions of wooly, torch, CUDA, installed vLLM, and the machine. Raises as :func:`gpu`."""
    import torch

    found = {**wooly(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for distribution in ("vllm", "cuda-bindings"):
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return {**found, **gpu(), "python": platform.python_version(), "cores": str(os.cpu_count())}


def required_gpu_stack() -> dict[str, str]:
    """Return :func:`gpu_stack`. Exits with a message if there is no GPU."""
    try:
        return gpu_stack()
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"this benchmark needs an NVIDIA GPU: {error}") from error


def load_average() -> float:
    """Return the load average of the last minute: other work on the machine slows a benchmark down."""
    return os.getloadavg()[0]
