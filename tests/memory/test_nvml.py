"""Free memory and processes of a GPU, as NVML answers: the functions of the library in C, or no library at all."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared_store.memory import Unknown
from shared_store.memory.cuda import nvml

GIB = 1 << 30
STUB = Path(__file__).with_name("nvml_stub.c")


def _build(directory, *options):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = directory / nvml.LIBRARY
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", library, STUB], check=True)
    return str(library)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("nvml"))


def test_free_bytes_are_told_by_uuid(library):
    assert nvml.free_bytes("GPU-plain", library) == 50 * GIB
    assert nvml.memory("GPU-plain", library) == nvml.GpuMemory(free=50 * GIB, total=80 * GIB)


def test_a_driver_with_the_first_version_of_the_call_alone_answers(library):
    assert nvml.free_bytes("GPU-old", library) == 50 * GIB


@pytest.mark.parametrize("name", ["MIG-part", "GPU-part"])
def test_a_mig_instance_is_found_under_either_prefix(library, name):
    """CUDA gives the UUID of an instance without its prefix."""
    assert nvml.free_bytes(name, library) == 9 * GIB


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("GPU-coherent", "Not Supported"),
        ("GPU-divided", "divided into MIG instances"),
        ("GPU-zero", "reports no memory"),
        ("GPU-lost", "GPU is lost"),
        ("GPU-absent", "Not Found"),
        ("MIG-absent", "Not Found"),
    ],
)
def test_memory_that_nvml_cannot_tell_is_unknown_with_the_reason_and_never_zero(library, device, reason):
    found = nvml.free_bytes(device, library)
    assert isinstance(found, Unknown)
    assert reason in found.reason


def test_without_the_library_free_memory_is_unknown_and_the_message_says_what_to_add(tmp_path):
    found = nvml.free_bytes("GPU-plain", str(tmp_path / nvml.LIBRARY))
    assert isinstance(found, Unknown)
    assert "NVML is not installed" in found.reason
    assert "NVIDIA_DRIVER_CAPABILITIES" in found.reason


def test_the_library_of_the_system_is_the_default():
    """It is missing on a machine without a driver, and answers on one with it."""
    found = nvml.free_bytes("GPU-absent")
    assert isinstance(found, Unknown)
    try:
        ctypes.CDLL(nvml.LIBRARY)
    except OSError:
        assert "NVML is not installed" in found.reason
    else:
        assert "NVML is not installed" not in found.reason


def test_a_driver_that_does_not_start_is_the_reason(tmp_path):
    found = nvml.free_bytes("GPU-plain", _build(tmp_path, "-DNO_DRIVER"))
    assert isinstance(found, Unknown)
    assert "Driver Not Loaded" in found.reason


def test_a_library_that_appears_later_is_used(tmp_path):
    """A failure is not remembered: a driver may be loaded while the store runs."""
    path = tmp_path / nvml.LIBRARY
    assert isinstance(nvml.free_bytes("GPU-plain", str(path)), Unknown)
    assert nvml.free_bytes("GPU-plain", _build(tmp_path)) == 50 * GIB


def test_the_library_is_found_by_name(library):
    """As the linker finds it, in a process of its own."""
    program = "from shared_store.memory.cuda import nvml; print(nvml.free_bytes('GPU-plain'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(Path(library).parent), "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(50 * GIB)


def test_processes_are_named_with_their_memory_and_an_unknown_amount_is_not_invented(library):
    assert nvml.usage("GPU-plain", library) == "the rest is used by pid 100 (1024 MiB), pid 101 (amount unknown)"


def test_more_processes_than_a_first_table_are_all_named(library):
    assert nvml.usage("GPU-crowded", library).count("pid ") == 40


def test_an_empty_list_is_explained(library):
    """In a container NVML often lists no process, although other processes use the GPU."""
    text = nvml.usage("GPU-old", library)
    assert "lists no process" in text
    assert "on the host" in text


def test_a_list_that_nvml_does_not_give_is_explained(library):
    assert "unknown: nvmlDeviceGetComputeRunningProcesses_v3: Not Supported" in nvml.usage("GPU-coherent", library)
