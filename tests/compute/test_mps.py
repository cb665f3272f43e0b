"""The cap of a workload under MPS takes effect, or is refused with the next step. A socket stands for the daemon."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_store.base.errors import ConfigError
from shared_store.compute import mps

GPU = ("GPU-1",)


@pytest.fixture
def pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the daemon's directory, without a daemon, and ask for 25 percent."""
    monkeypatch.setenv(mps.PIPES, str(tmp_path))
    monkeypatch.setenv("WOOLY_MPS_PERCENT", "25")
    monkeypatch.setenv(mps.THREADS, "1")  # so that it is restored after the test
    monkeypatch.delenv(mps.THREADS)
    return tmp_path


@contextlib.contextmanager
def listening(pipes: Path, kind: int = socket.SOCK_SEQPACKET) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as daemon:
        daemon.bind(str(pipes / "control"))
        daemon.listen()
        daemon.setblocking(False)
        yield daemon


def links(folder: Path, *targets: str) -> Path:
    """Return a directory as ``/proc/self/fd`` is, with links to files that need not exist."""
    folder.mkdir()
    for number, target in enumerate(targets):
        (folder / str(number)).symlink_to(target)
    return folder


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_it_is_set_for_this_process_and_its_children_with_the_danger_in_the_log(
    pipes: Path, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(pipes, kind) as daemon, caplog.at_level(logging.WARNING):
        mps.cap(GPU)
        mps.cap(GPU)  # of a second engine in the process
        with pytest.raises(BlockingIOError):
            daemon.accept()  # it was looked at, and not connected to
    assert os.environ[mps.THREADS] == "25"
    child = f"import os; print(os.environ[{mps.THREADS!r}])"
    assert subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout == "25\n"
    assert "25% of the threads" in caplog.text
    assert "a fault of one process" in caplog.text


def test_unset_nothing_is_asked_and_nothing_set(pipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WOOLY_MPS_PERCENT")
    mps.cap(GPU)
    mps.cap(("cpu",))
    assert mps.THREADS not in os.environ
    assert not list(pipes.iterdir())


def refused(devices: tuple[str, ...] = GPU, *, match: str, fds: Path | None = None) -> None:
    before = os.environ.get(mps.THREADS)
    with pytest.raises(ConfigError, match=match):
        mps.cap(devices, *(() if fds is None else (fds,)))
    assert os.environ.get(mps.THREADS) == before


def test_a_workload_on_cpu_is_refused(pipes: Path) -> None:
    with listening(pipes):
        refused(("cpu",), match="WOOLY_MPS_PERCENT=25 caps a workload on GPUs, .* unset it")


@pytest.mark.usefixtures("pipes")
def test_without_a_daemon_it_is_refused() -> None:
    refused(match=r"control has none \(No such file or directory\): start one with `nvidia-cuda-mps-control -d`")


def test_a_socket_that_a_daemon_left_is_refused(pipes: Path) -> None:
    with listening(pipes):
        pass
    refused(match=r"control has none \(Connection refused\)")


def test_a_pipe_counts_while_it_is_read(pipes: Path) -> None:
    os.mkfifo(pipes / "control")
    refused(match=r"control has none \(No such device or address\)")
    reader = os.open(pipes / "control", os.O_RDONLY | os.O_NONBLOCK)
    try:
        mps.cap(GPU)
    finally:
        os.close(reader)
    assert os.environ[mps.THREADS] == "25"


def test_another_percentage_of_the_user_is_refused(pipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mps.THREADS, "50")
    with listening(pipes):
        refused(match="WOOLY_MPS_PERCENT=25 and CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50 contradict each other")


def test_after_cuda_started_only_a_cap_that_it_read_is_accepted(
    pipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = links(tmp_path / "fds", "/dev/nvidiactl", "socket:[7]", "/dev/nvidia-uvm")
    with listening(pipes):
        refused(fds=fds, match="CUDA has started in this process already.*before the process starts")
        monkeypatch.setenv(mps.THREADS, "25")
        mps.cap(GPU, fds)


def test_it_is_set_ahead_only_while_cuda_would_read_it(pipes: Path, tmp_path: Path) -> None:
    """What is set ahead is checked when the workload joins, with or without a daemon."""
    mps.prepare(links(tmp_path / "late", "/dev/nvidia-uvm"))
    assert mps.THREADS not in os.environ
    mps.prepare(links(tmp_path / "early", "/dev/nvidiactl"))
    assert os.environ[mps.THREADS] == "25"
    refused(match="WOOLY_MPS_PERCENT needs an MPS control daemon")
    with listening(pipes):
        mps.cap(GPU, tmp_path / "late")


def test_nvml_alone_does_not_count_as_cuda(pipes: Path, tmp_path: Path) -> None:
    fds = links(tmp_path / "fds", "/dev/nvidiactl", "/dev/nvidia0")
    with listening(pipes):
        mps.cap(GPU, fds)
    assert os.environ[mps.THREADS] == "25"


@pytest.mark.parametrize("wrong", ["0", "101", "25%", "half", "12.5"])
def test_a_wrong_percentage_lists_the_right_ones(pipes: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("WOOLY_MPS_PERCENT", wrong)
    with listening(pipes):
        refused(match="use a whole percentage from 1 to 100")
