"""The device that rows of the parity matrix run on."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from support.machine import processor_name

from benchmarks.harness.gpu import nvidia_smi


@dataclass(frozen=True)
class Machine:
    """A GPU or a CPU.

    Attributes:
        device: Its name.
        driver: Version of the NVIDIA driver; empty on a CPU.
        on_gpu: True for a GPU.
    """

    device: str
    driver: str
    on_gpu: bool


def machine() -> Machine:
    """Return the first visible GPU, or the CPU if there is none."""
    try:
        return Machine(nvidia_smi("name"), nvidia_smi("driver_version"), on_gpu=True)
    except (OSError, subprocess.SubprocessError):
        return Machine(processor_name(), "", on_gpu=False)
