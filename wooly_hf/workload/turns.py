"""The turns of a process: tells the compute gate about the steps of all threads, and whether the process has work.

A step is a call of a model from outside, or a backward pass. Work lasts as long as a thread is in ``generate`` or in a
step, and :data:`LINGER_S` longer. Programs call models in loops with little in between (a sampled token, an optimizer's
step); if work ended with each call, a less important workload would begin a step in each gap.

On a GPU a call returns before the device has computed it. While others share the device, the end of a step waits for
that; otherwise nothing waits, and the time that is told is that of the call.

Locks: the compute gate's are taken under the one of this module, never the other way round.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import torch

from shared_store.compute.gate import ComputeGate
from wooly_hf.workload import ranks

LINGER_S: Final = 0.01
"""Seconds for which a process counts as one with work after its last step."""


class Pass(Protocol):
    """A backward pass through the graph of one call. ``thread``: made the call."""

    thread: int

    def end(self) -> None:
        """Count it as ended. Idempotent."""


def in_backward() -> bool:
    """Return whether this thread computes for a backward pass: one that makes calls again (checkpointing)."""
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks


class Turns:
    """One for each process. Thread-safe.

    Attributes:
        gate: the workload's compute gate.
        ungated: why no step is ever held; empty if they may be.
    """

    def __init__(self, changed: Callable[[], None], device: torch.device, ungated: str = "") -> None:
        """Begin without an arbiter.

        Args:
            changed: called in another thread when steps may begin again.
            device: on which the models compute.
            ungated: why no step is ever held; empty if they may be.
        """
        self.gate = ComputeGate(changed)
        self.ungated = ungated
        self._device = device
        self._lock = threading.Lock()
        self._in_flight = 0
        self._working = False
        self._said = False
        self._lost: deque[None] = deque()
        self._passes: weakref.WeakSet[Pass] = weakref.WeakSet()
        self._ended_at = 0.0
        self._ended = threading.Event()
        self._closed = False

    def start(self) -> None:
        """Start the thread that says when work has ended."""
        threading.Thread(target=self._linger, name="wooly-turns", daemon=True).start()

    def work(self, *, has: bool) -> None:
        """Say whether threads use models to compute."""
        if has is self._working:
            return
        with self._lock:
            self._working = has
            self._tell()

    def may_begin(self) -> bool:
        """Return whether a step of this thread may begin now. One that a backward pass makes again always may."""
        return bool(self.ungated) or self.gate.may_begin() or in_backward() or self._is_rank()

    def watch(self, backward: Pass) -> None:
        """Take up a backward pass that begins."""
        with self._lock:
            self._passes.add(backward)

    def end_failed(self) -> None:
        """End the backward passes of this thread's graphs that failed: the thread is in none, and goes on."""
        if not self._passes or in_backward():
            return
        with self._lock:
            passes = [one for one in self._passes if one.thread == threading.get_ident()]
        for one in passes:
            one.end()

    def hold(self) -> None:
        """Say that a step would begin, were it not held."""
        self.gate.hold()

    def begin(self) -> None:
        """Say that a step begins."""
        with self._lock:
            self._in_flight += 1
            self._tell()
            self.gate.begin()

    def end(self) -> None:
        """Say that a step ended. Comes after :meth:`settle`, or without it if the step failed."""
        with self._lock:
            self._in_flight -= 1
            self.gate.end(self._in_flight)
            self._tell()

    def end_later(self) -> None:
        """Say that a step has ended at the next :meth:`look`. Takes no lock."""
        self._lost.append(None)

    def look(self) -> None:
        """Look for steps that have ended meanwhile."""
        while self._lost:
            self._lost.popleft()
            self.end()

    def settle(self) -> None:
        """Wait until the device has computed what the current stream has, if that matters to others."""
        if self._device.type == "cuda" and self.gate.contended and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Leave the arbiter. Idempotent."""
        with self._lock:
            self._closed = True
        self._ended.set()
        self.gate.close()

    def _is_rank(self) -> bool:
        """Return whether the process has become a rank of a job. Asked where it would be held otherwise."""
        self.ungated = ranks.group()
        return bool(self.ungated)

    def _tell(self) -> None:
        """Say that there is work, or have the thread say that there is none. With the lock."""
        if self._working or self._in_flight:
            if not self._said:
                self._said = True
                self.gate.work(has=True)
        elif self._said:
            self._ended_at = time.monotonic()
            if not self._ended.is_set():
                self._ended.set()

    def _linger(self) -> None:
        """Say that work has ended when it has not begun again for some time.

        While calls follow each other closely, the thread looks from time to time, so that they need not wake it.
        """
        while True:
            self._ended.wait()
            if self._closed:
                return
            time.sleep(LINGER_S)
            with self._lock:
                if self._working or self._in_flight:
                    self._ended.clear()
                elif time.monotonic() - self._ended_at >= LINGER_S:
                    self._ended.clear()
                    self._said = False
                    self.gate.work(has=False)
