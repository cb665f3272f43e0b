"""The first visible GPU: its name and memory, a CUDA context, and NVIDIA's Multi-Process Service.

Relies on ``nvidia-smi`` for the device's memory: asking CUDA would create a context in the benchmark's own process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

from benchmarks.harness.processes import ChildError

SETTLE_TIMEOUT_S = 10.0


def nvidia_smi(query: str) -> str:
    """Return one property of the first visible GPU, such as ``memory.used`` (MiB).

    Raises:
        OSError: ``nvidia-smi`` is not installed.
        subprocess.SubprocessError: It failed, for example because there is no GPU.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", first]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def used_mib() -> int:
    """Return the memory in use (MiB) once it is stable: the driver frees memory of exited processes with a delay."""
    before, now = -1, int(nvidia_smi("memory.used"))
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while now != before and time.monotonic() < deadline:
        time.sleep(0.3)
        before, now = now, int(nvidia_smi("memory.used"))
    return now


def results_folder(name: str) -> str:
    """Return the folder of a GPU's results: ``h100`` for ``NVIDIA H100 80GB HBM3``."""
    found = re.search(r"\b[A-Z]+\d+\w*", name)
    return found.group().lower() if found else "gpu"


def first_gpu() -> str:
    """Return the UUID of the first visible GPU. Exits with a message if there is none."""
    from shared_store.memory.cuda.driver import visible_gpus

    device = next(iter(visible_gpus()), None)
    if device is None:
        raise SystemExit("this benchmark needs an NVIDIA GPU and cuda-bindings: see `wooly doctor`")
    return device


def make_context() -> None:
    """Make the first GPU's primary context current in this thread."""
    from cuda.bindings import driver

    for error, *_ in (
        driver.cuInit(0),
        (retained := driver.cuDevicePrimaryCtxRetain(0)),
        driver.cuCtxSetCurrent(retained[1]),
    ):
        if error != driver.CUresult.CUDA_SUCCESS:
            raise SystemExit(f"cannot create a context on the GPU: {error}")


class Mps:
    """NVIDIA's Multi-Process Service, for processes that get its ``environment``. The context manager's exit stops it.

    Changes no setting of the GPU.
    """

    CONTROL = "nvidia-cuda-mps-control"

    def __init__(self, scratch: Path) -> None:
        """Use ``scratch`` for pipes and logs. Raises :class:`ChildError` if the service is not installed."""
        if shutil.which(self.CONTROL) is None:
            raise ChildError(f"{self.CONTROL} is not installed on this machine")
        directory = scratch / "mps"
        directory.mkdir()
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(directory), "CUDA_MPS_LOG_DIRECTORY": str(directory)}

    def __enter__(self) -> Self:
        self._control("-d")
        return self

    def __exit__(self, *_: object) -> None:
        self._control(words="quit\n")

    def _control(self, *arguments: str, words: str = "") -> None:
        result = subprocess.run(
            [self.CONTROL, *arguments],
            input=words,
            capture_output=True,
            text=True,
            timeout=60,
            # With CUDA_VISIBLE_DEVICES set, the service would number GPUs differently from its clients.
            env={**{k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}, **self.environment},
            check=False,
        )
        if result.returncode:
            raise ChildError(f"{self.CONTROL}: {result.stdout}{result.stderr}")
