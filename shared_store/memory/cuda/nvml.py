"""Questions about a whole GPU, answered by NVML: the driver API answers them only to a process with a context.

Relies on ``libnvidia-ml.so.1``, which comes with the driver. A container has it if its driver capabilities include
``utility``. NVML creates no context, may be called from any thread, and counts ``nvmlInit_v2``. It is called through
ctypes, because only new releases of cuda-bindings contain it (12.9.6, 13.2). Functions, structs and codes:
https://docs.nvidia.com/deploy/nvml-api/

Does not promise an answer: the library may be missing, a GPU that shares the memory of its host has no memory of its
own to report, and a container may not see processes outside. Numbers that NVML does not tell are
:class:`~shared_store.memory.backend.Unknown`, with the reason.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from shared_store.memory.backend import Unknown

LIBRARY: Final = "libnvidia-ml.so.1"

_MEBIBYTE: Final = 1 << 20
_NOT_SUPPORTED: Final = 3  # nvmlReturn_t
_NOT_FOUND: Final = 6
_INSUFFICIENT_SIZE: Final = 7
_FUNCTION_NOT_FOUND: Final = 13
_VERSION_MISMATCH: Final = 25
_NO_VALUE: Final = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE
_SPARE: Final = 16  # processes that may start between two calls


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU's memory."""

    free: int
    total: int


class NvmlError(Exception):
    """NVML is not there, or refused a call. The message is the reason; ``code`` is an ``nvmlReturn_t``, or 0."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Memory2(ctypes.Structure):
    """``nvmlMemory_v2_t``."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Process(ctypes.Structure):
    """``nvmlProcessInfo_t``, of version 3 of the function."""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Nvml:
    """The library, initialised for the rest of the process."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Load and initialise it. Raises :class:`NvmlError`."""
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise NvmlError(
                f"NVML is not installed ({error}); in a container, add `utility` to NVIDIA_DRIVER_CAPABILITIES"
            ) from error
        self._call("nvmlInit_v2")

    def memory(self, device: str) -> GpuMemory:
        """Return the memory of a GPU, or of a MIG instance, by its UUID. Raises :class:`NvmlError`."""
        handle = self._handle(device)
        try:
            found: _Memory | _Memory2 = _Memory2(version=ctypes.sizeof(_Memory2) | 2 << 24)
            self._call("nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(found))
        except NvmlError as error:
            if error.code not in {_FUNCTION_NOT_FOUND, _VERSION_MISMATCH}:  # those of an older driver
                raise
            found = _Memory()
            self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(found))
        if not found.total:
            raise NvmlError(f"NVML reports no memory for {device}")
        return GpuMemory(int(found.free), int(found.total))

    def processes(self, device: str) -> list[tuple[int, int | None]]:
        """Return the pid and bytes of each process that computes on a GPU; None: not told. Raises NvmlError."""
        handle = self._handle(device)
        count = ctypes.c_uint(0)
        table = (_Process * 0)()
        while True:
            try:
                self._call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), table)
            except NvmlError as error:
                if error.code != _INSUFFICIENT_SIZE:
                    raise
                count = ctypes.c_uint(count.value + _SPARE)
                table = (_Process * count.value)()
            else:
                rows = table[: count.value]
                return [(row.pid, None if row.used == _NO_VALUE else row.used) for row in rows]

    def _handle(self, device: str) -> ctypes.c_void_p:
        """Return the handle of a device by its UUID, of a MIG instance under either prefix."""
        handle = ctypes.c_void_p()
        try:
            self._call("nvmlDeviceGetHandleByUUID", device.encode(), ctypes.byref(handle))
        except NvmlError as error:
            instance = "MIG-" + device.removeprefix("GPU-")
            if error.code != _NOT_FOUND or instance == device:
                raise
            self._call("nvmlDeviceGetHandleByUUID", instance.encode(), ctypes.byref(handle))
            return handle
        if device.startswith("GPU-") and self._divided(handle):
            raise NvmlError(f"{device} is divided into MIG instances, and is none of them")
        return handle

    def _divided(self, handle: ctypes.c_void_p) -> bool:
        """Return True if a physical GPU is in MIG mode."""
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        try:
            self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        except NvmlError as error:
            if error.code not in {_NOT_SUPPORTED, _FUNCTION_NOT_FOUND}:
                raise
        return bool(current.value)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises :class:`NvmlError` with NVML's own text."""
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise NvmlError(f"{name}: this driver does not have it", _FUNCTION_NOT_FOUND) from error
        code = function(*arguments)
        if code:
            text = self._library.nvmlErrorString
            text.restype = ctypes.c_char_p
            raise NvmlError(f"{name}: {(text(code) or b'unknown error').decode(errors='replace')} ({code})", code)


_lock = threading.Lock()
_loaded: dict[str, Nvml] = {}


def nvml(library: str = LIBRARY) -> Nvml:
    """Return the library, loaded on first use. A failure is not remembered. Raises :class:`NvmlError`."""
    with _lock:
        if library not in _loaded:
            _loaded[library] = Nvml(library)
        return _loaded[library]


def memory(device: str, library: str = LIBRARY) -> GpuMemory | Unknown:
    """Return the memory of a GPU, or of a MIG instance, by its UUID."""
    try:
        return nvml(library).memory(device)
    except NvmlError as error:
        return Unknown(str(error))


def free_bytes(device: str, library: str = LIBRARY) -> int | Unknown:
    """Return the free bytes of a GPU, or of a MIG instance, by its UUID."""
    found = memory(device, library)
    return found if isinstance(found, Unknown) else found.free


def usage(device: str, library: str = LIBRARY) -> str:
    """Describe which processes use a GPU's memory, for an error message."""
    try:
        return describe(nvml(library).processes(device))
    except NvmlError as error:
        return f"and its other users are unknown: {error}"


def describe(processes: Iterable[tuple[int, int | None]]) -> str:
    """Describe processes by pid and bytes, as :meth:`Nvml.processes` returns them."""
    texts = [
        f"pid {pid} (amount unknown)" if used is None else f"pid {pid} ({used // _MEBIBYTE} MiB)"
        for pid, used in processes
    ]
    if not texts:
        return "and NVML lists no process that uses it (in a container it may not see them: `nvidia-smi` on the host)"
    return f"the rest is used by {', '.join(texts)}"
