"""The cap of a workload under NVIDIA MPS, as ``WOOLY_MPS_PERCENT`` asks for it. Off by default.

Sets ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE``, which CUDA reads when it starts in a process, for the caller's process and
those that it starts. The cap stays until they end, and no other workload gets what is left of it unused.

The processes of one MPS daemon share a context on the GPU. A fault of one of them, such as a write to shared weights,
ends all of them; without MPS it ends that one alone.

Relies on CUDA's names of the variables, and on the daemon's socket ``control`` in ``CUDA_MPS_PIPE_DIRECTORY``
(https://docs.nvidia.com/deploy/mps). Does not start a daemon, and does not find one that runs for another user.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConfigError

log = logging.getLogger(__name__)

THREADS: Final = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPES: Final = "CUDA_MPS_PIPE_DIRECTORY"
DEFAULT_PIPES: Final = "/tmp/nvidia-mps"  # noqa: S108 - the daemon's default
_OWN_FDS: Final = Path("/proc/self/fd")
_USED_BY_CUDA: Final = "/dev/nvidia-uvm"

DANGER: Final = (
    "under MPS a fault of one process, such as a write to shared weights, ends all processes of the MPS daemon; the "
    "requests that run in them are lost"
)


def prepare(fds: Path = _OWN_FDS) -> None:
    """Set the cap ahead of :func:`cap`, which checks it, if it can still take effect: something may start CUDA before.

    Without MPS the variable has no effect.

    Args:
        fds: directory with a link for each descriptor of this process.

    Raises:
        ConfigError: the percentage is invalid.
    """
    percent = envs.MPS_PERCENT.get()
    if percent is not None and THREADS not in os.environ and not _started(fds):
        os.environ[THREADS] = str(percent)


def cap(devices: Sequence[str], fds: Path = _OWN_FDS) -> None:
    """Cap this workload, if ``WOOLY_MPS_PERCENT`` is set. Call it before CUDA starts in this process. Idempotent.

    Args:
        devices: of the workload, as the store names them; of GPUs any name does.
        fds: directory with a link for each descriptor of this process.

    Raises:
        ConfigError: the cap would have no effect. The message says why, and what to do.
    """
    percent = envs.MPS_PERCENT.get()
    if percent is None:
        return
    name = f"{envs.MPS_PERCENT.name}={percent}"
    if "cpu" in devices:
        raise ConfigError(f"{name} caps a workload on GPUs, and this one computes on cpu: unset it")
    check_daemon()
    given = os.environ.get(THREADS)
    if given is not None and given != str(percent):
        raise ConfigError(f"{name} and {THREADS}={given} contradict each other: unset one of them")
    if given is None and _started(fds):
        raise ConfigError(
            f"{name}: CUDA has started in this process already, and reads a cap only then: set {THREADS}={percent} "
            "before the process starts, or use the GPU first when the model is loaded"
        )
    os.environ[THREADS] = str(percent)
    log.warning("wooly: this workload may use %d%% of the threads of a GPU (%s): %s", percent, name, DANGER)


def check_daemon() -> None:
    """Raise :class:`ConfigError` if no MPS daemon can be reached from this process. Connects to nothing."""
    path = Path(os.environ.get(PIPES) or DEFAULT_PIPES, "control")
    advice = (
        "start one with `nvidia-cuda-mps-control -d`, as the user of this process, set "
        f"{PIPES} to the directory of the one that runs, or unset {envs.MPS_PERCENT.name}"
    )
    try:
        if stat.S_ISSOCK(path.stat().st_mode):
            _knock(path)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))  # a pipe: fails without a reader
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{envs.MPS_PERCENT.name} needs an MPS control daemon, and {path} has none ({reason}): {advice}"
        ) from error


def _knock(path: Path) -> None:
    """Raise ``OSError`` if no process has a socket open.

    A datagram socket cannot be connected to one with connections: the kernel then says that the type is wrong, and
    otherwise that the connection is refused. So a daemon that is there notices nothing.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise


def _started(fds: Path) -> bool:
    """Return True if CUDA has started in this process: it has its device open. NVML has others."""
    for link in fds.iterdir():
        try:
            if str(link.readlink()) == _USED_BY_CUDA:
                return True
        except FileNotFoundError:
            continue  # closed meanwhile
    return False
