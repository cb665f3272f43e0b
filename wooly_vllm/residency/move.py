"""The move of one worker's memory off its device and back: its KV cache, other private memory, and shared weights.

Private memory is copied to the host, into an arena or a swap file; shared weights have host copies that the store
keeps (:mod:`shared_store.sleep`). Memory is unmapped last, once everything else succeeded, and mapped first. So a move
that fails leaves the worker as it was.

Relies on the engine: no step is in flight during a move, and its calls come in the order of :mod:`~.worker`.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from shared_store.base.errors import DigestMismatchError, DiskError, WoolyError
from shared_store.memory import Backend
from shared_store.private.copies import Copy
from shared_store.private.ranges import PrivateMemory
from shared_store.sleep.sleeper import Sleeper
from wooly_vllm import compat
from wooly_vllm.residency import rows as tables
from wooly_vllm.residency import shared_models
from wooly_vllm.residency.host_space import HostSpace
from wooly_vllm.residency.outside import Outside
from wooly_vllm.residency.phase import phase_of
from wooly_vllm.residency.rows import Rows

_ATTRIBUTE: Final = "_wooly_mover"

NO_MEMORY_OF_OURS: Final = "its KV cache is not in memory that wooly can release"


class Mover:
    """Moves the memory of one worker."""

    def __init__(self, worker: Any, device: torch.device, backend: Backend) -> None:
        """Begin resident, without private memory."""
        self._worker = weakref.ref(worker)
        self.memory = PrivateMemory(backend, phase_of(backend))
        self.refusal = ""
        """Why this worker cannot leave."""
        self._device = device
        self._space = HostSpace(backend)
        self._outside = Outside(device)
        self._blocks: Sequence[Rows] = ()
        self._others: Sequence[Rows] = ()
        self._copies: _Copies | None = None
        self._away = False
        self._steps: defaultdict[str, float] = defaultdict(float)

    @classmethod
    def of(cls, worker: Any) -> Mover:
        """Return the worker's mover. A worker without one gets one that refuses."""
        found = vars(worker).get(_ATTRIBUTE)
        if found is None:
            device = torch.device(worker.device)
            found = cls.attach(worker, device)
            found.refusal = NO_MEMORY_OF_OURS
        assert isinstance(found, Mover)  # noqa: S101 - set below
        return found

    @classmethod
    def attach(cls, worker: Any, device: torch.device) -> Mover:
        """Make the mover of a worker on a device. Raises :class:`UnknownDeviceError`."""
        from shared_store.torch.devices import backend_of

        made = cls(worker, device, backend_of(device))
        setattr(worker, _ATTRIBUTE, made)
        return made

    def set_blocks(self, blocks: Sequence[Rows]) -> None:
        """Use these tables of KV blocks from now on."""
        self._blocks = tuple(blocks)

    def set_others(self, others: Sequence[Rows]) -> None:
        """Use these tables of other private memory from now on."""
        self._others = tuple(others)

    def count_outside(self, nbytes: int) -> None:
        """Count memory on a CPU that vLLM allocated itself, and that cannot leave."""
        self._outside.count(nbytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block, in all tables."""
        return sum(table.nbytes for table in self._blocks)

    def holdings(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_holdings`."""
        private, needs = self._private(), self._outside.needed() + self.memory.nbytes
        sleepers = self._sleepers()
        return {
            "device": self.memory.backend.device,
            "private": private,
            "stays": private if self.refusal else self._outside.stays(),
            "needs": needs,
            "shared": sum(sleeper.nbytes for sleeper in sleepers),
            "block_bytes": self.block_bytes,
            "host_bytes": self._space.host_bytes,
            "copy_room": max(0, self._space.room() - self._other_bytes()),
            "refusal": self.refusal,
            "shares": bool(sleepers),
        }

    def prepare(self, blocks: int) -> str:
        """See :func:`~.worker.wooly_prepare_leave`."""
        if self.refusal or self._away:
            return self.refusal
        try:
            for sleeper in self._sleepers():
                sleeper.prepare()
            others = sum(len(numbers) * table.nbytes for table, numbers in self._pages())
            self._space.prepare(blocks * self.block_bytes + others)
        except (WoolyError, OSError, RuntimeError) as error:  # of the kernel, or of torch
            return _text(error)
        return ""

    def save(self, block_ids: Sequence[int]) -> str:
        """See :func:`~.worker.wooly_save`."""
        if self.refusal or self._away:
            return self.refusal
        self._drop_copies()
        self._steps.clear()
        try:
            with self._timed("copy"):
                self._copies = self._copied(block_ids)
        except (WoolyError, OSError, RuntimeError) as error:
            self._drop_copies()
            return _text(error)
        return ""

    def leave(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_leave`."""
        if self._away:
            return self._moved(error="")
        if self._copies is None:
            return self._moved(error="nothing was saved")
        slept = []
        try:
            with self._timed("weights"):
                for sleeper in self._sleepers():
                    slept.append(sleeper)  # it may fail with a part unmapped
                    sleeper.sleep()
            with self._timed("unmap"):
                self.memory.go_away()
                self._outside.reclaim()
        except (WoolyError, OSError, RuntimeError) as error:
            # Memory that is gone returns before steps may run again: an error here ends the engine.
            self.memory.come_back()
            if lost := self._fill_memory():
                raise DiskError(f"{_text(error)}; {lost}") from error
            for sleeper in slept:
                sleeper.wake()
            self._drop_copies()
            return self._moved(error=_text(error))
        self._away = True
        return self._moved(error="")

    def stay(self) -> None:
        """See :func:`~.worker.wooly_stay`."""
        if not self._away:
            self._drop_copies()
            for sleeper in self._sleepers():
                sleeper.stay_awake()

    def create(self) -> str:
        """See :func:`~.worker.wooly_create`."""
        if not self._away:
            return ""
        self._steps.clear()
        try:
            with self._timed("map"):
                self.memory.come_back()
            with self._timed("weights"):
                for sleeper in self._sleepers():
                    sleeper.wake()
        except (WoolyError, OSError, RuntimeError) as error:
            self.roll_back()
            return _text(error)
        return ""

    def fill(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_fill`."""
        lost = ""
        if self._away:
            lost = self._fill_memory()
            self._away = False
        found = self._moved(lost=lost)
        self._drop_copies()
        return found

    def roll_back(self) -> None:
        """See :func:`~.worker.wooly_roll_back`."""
        if self._away:
            for sleeper in self._sleepers():
                try:
                    sleeper.sleep()
                except WoolyError as error:  # its host copies are gone, or the store; it is awake for the next attempt
                    compat.logger().warning("wooly: shared weights stay on this device: %s", _text(error))
            self.memory.go_away()
            self._outside.reclaim()

    def reclaim(self) -> None:
        """Return memory that torch caches to the device."""
        self._outside.reclaim()

    def get_ready(self) -> None:
        """Get memory for copies in the background, once the worker has started."""
        if not self.refusal:
            self._space.get_ahead(self.memory.nbytes)

    def pin(self) -> None:
        """See :func:`~.worker.wooly_pin`."""
        self._space.pin()

    def unpin(self) -> str:
        """See :func:`~.worker.wooly_unpin`."""
        try:
            self._space.unpin()
        except WoolyError as error:
            return _text(error)
        return ""

    def discard(self) -> None:
        """Unmap private memory for vLLM's own sleep, which discards KV caches: other contents are kept.

        Raises:
            WoolyError: they cannot be copied. Everything is in place.
        """
        if self.memory.away or self.refusal:
            return
        self._copies = self._copied(())
        self.memory.go_away()

    def bring_empty(self) -> None:
        """Map private memory after :meth:`discard`; the KV cache is zero.

        Raises:
            OutOfMemoryError: the device has too little memory. It is still away.
        """
        if self.memory.away and not self._away:
            self.memory.come_back()
            self._fill_memory()
            self._drop_copies()

    def _copied(self, block_ids: Sequence[int]) -> _Copies:
        """Copy blocks and other private memory to the host."""
        self._synchronize()
        pages = self._pages()
        nbytes = sum(len(numbers) * table.nbytes for table, numbers in pages)
        with contextlib.ExitStack() as failed:
            copy = self._space.copy(nbytes + len(block_ids) * self.block_bytes)
            failed.callback(copy.close)
            for table, numbers in pages:
                tables.save([table], numbers, copy)
            tables.save(self._blocks, block_ids, copy)
            failed.pop_all()
        return _Copies(copy, pages, tuple(block_ids))

    def _pages(self) -> list[tuple[Rows, list[int]]]:
        """Return the other tables, each with the numbers of its rows that are not zero."""
        return [(table, tables.nonzero(table)) for table in self._others]

    def _fill_memory(self) -> str:
        """Zero private memory and copy its contents back. Returns why KV blocks are lost, or "".

        Raises:
            DigestMismatchError, DiskError: contents that cannot be computed again are lost.
        """
        with self._timed("zero"):
            self._zero()
        copies = self._copies
        if copies is None:
            self._synchronize()
            return "nothing was saved"
        with self._timed("copy"):
            copies.copy.rewind()
            for table, numbers in copies.pages:
                tables.restore([table], numbers, copies.copy)
            try:
                tables.restore(self._blocks, copies.block_ids, copies.copy)
            except (DigestMismatchError, DiskError) as error:
                tables.zero(self._blocks)
                return _text(error)
            finally:
                self._synchronize()  # steps may run on another stream
        return ""

    def _synchronize(self) -> None:
        """Wait for everything that this process started on the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _zero(self) -> None:
        if not self.memory.backend.zeroed:
            tables.zero([*self._blocks, *self._others])

    def _sleepers(self) -> list[Sleeper]:
        """Return the sleepers of the worker's shared models."""
        return shared_models.sleepers(self._worker())

    def _private(self) -> int:
        return self._outside.now() + self.memory.mapped_bytes

    def _other_bytes(self) -> int:
        return sum(table.nbytes * table.count for table in self._others)

    def _drop_copies(self) -> None:
        copies, self._copies = self._copies, None
        if copies is not None:
            copies.copy.close()
            self._space.free()

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._steps[step] += time.monotonic() - began

    def _moved(self, **facts: str) -> dict[str, Any]:
        moved = 0 if self._copies is None else self._copies.copy.nbytes
        return {"private": self._private(), "moved": moved, "steps": dict(self._steps), **facts}


class _Copies:
    """What a worker saved: the copy, the pages of each other table, and the KV blocks."""

    def __init__(self, copy: Copy, pages: Sequence[tuple[Rows, list[int]]], block_ids: tuple[int, ...]) -> None:
        self.copy = copy
        self.pages = pages
        self.block_ids = block_ids


def _text(error: Exception) -> str:
    code = f" [{error.code}]" if isinstance(error, WoolyError) else ""
    return f"{error}{code}" if code else f"{type(error).__name__}: {error}"
