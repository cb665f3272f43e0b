"""Memory that others took and gave on a GPU while an engine starts, by the store's accounts.

vLLM reads the GPU's free memory when a worker starts and again when it has run the model once, and takes the difference
for the worker's own. Meanwhile other workloads may leave and return. Each reading is corrected by what they took since
the first one, so that both are as if nothing of others had moved.

The accounts follow the memory: a workload reports after it has unmapped or filled memory. A reading therefore waits for
a moment in which no other workload is on its way.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from shared_store.base.errors import WoolyError
from shared_store.base.status import Status
from shared_store.base.workload_states import WorkloadState
from shared_store.client.session import Session
from wooly_vllm import compat

_AT_REST = {WorkloadState.RESIDENT.value, WorkloadState.SWAPPED.value, WorkloadState.CHECKPOINTED.value}
_REST_S = 10.0
"""Longest time for which a reading waits until no other workload is on its way."""
_LOOK_S = 0.02


class Others:
    """What others have on one GPU, beside the worker that starts."""

    def __init__(self, session: Session, device: str, member_of: str, attached: int) -> None:
        """Begin to compare.

        Args:
            session: with the store.
            device: the GPU's UUID.
            member_of: the id of the worker's workload.
            attached: bytes of segments on the GPU that the worker will map; they were there before.
        """
        self._session = session
        self._device = device
        self._member_of = member_of
        self._attached = attached
        self._first: int | None = None

    def taken(self) -> int:
        """Return the bytes that others took since the first call; negative if they gave some. 0 without a store."""
        try:
            now = self._bytes()
        except WoolyError as error:
            compat.logger().warning("wooly: memory of others on %s is unknown: %s", self._device, error)
            return 0
        if self._first is None:
            self._first = now
        return now - self._first

    def _bytes(self) -> int:
        end = time.monotonic() + _REST_S
        while True:
            status = self._session.status()
            if _at_rest(status, self._device, self._member_of) or time.monotonic() > end:
                return bytes_of_others(status, self._device, self._member_of, self._attached)
            time.sleep(_LOOK_S)


def _at_rest(status: Status, device: str, member_of: str) -> bool:
    return all(
        workload.state in _AT_REST
        for workload in status.workloads
        if workload.id != member_of and any(part.device == device for part in workload.memory)
    )


def bytes_of_others(status: Status, device: str, member_of: str, attached: int) -> int:
    """Return the bytes on a device that a workload neither allocated nor published.

    Args:
        status: of the store.
        device: the GPU's UUID.
        member_of: the id of the workload.
        attached: bytes of segments that it maps but that were there before.
    """
    resident = sum(one.resident_bytes for one in status.devices if one.id == device)
    private = shared = 0
    for workload in status.workloads:
        for part in workload.memory:
            if part.device == device and workload.id == member_of:
                shared += part.shared
            elif part.device == device:
                private += part.private
    return private + resident - max(0, shared - attached)


def corrected(measure: Callable[[Any], None], others: Callable[[], Others | None]) -> Callable[[Any], None]:
    """Wrap ``MemorySnapshot.measure`` to leave out what others took, while a worker starts."""

    @functools.wraps(measure)
    def wrapper(self: Any) -> None:
        measure(self)
        compared = others()
        if compared is not None:
            taken = compared.taken()
            self.free_memory += taken
            self.cuda_memory -= taken
            self.non_torch_memory -= taken

    wrapper.wooly = True  # type: ignore[attr-defined]  # a mark on a function
    return wrapper
