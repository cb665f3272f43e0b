"""Takes the models of this process off their devices, and back: what the agent asks of a transformers process.

What leaves are shared weights. They are immutable, and their host copies are made before the gate closes, so that
threads wait only while memory is unmapped. Private memory stays: heads, adapters, the cache of a generation that waits
at the gate. On a GPU torch's unused memory is released.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from shared_store.base.errors import DeclinedError, OutOfMemoryError, WoolyError
from shared_store.memory.unmapping import captures
from shared_store.overcommit.mover import Holdings, Reached, Steps
from shared_store.sleep.model import NO_STORE
from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.devices import store_device, work_on
from shared_store.torch.views import storage_key
from wooly_hf.absent import Absence
from wooly_hf.workload.gate import Gate
from wooly_hf.workload.references import references_elsewhere
from wooly_hf.workload.shared_model import SharedModel

log = logging.getLogger(__name__)


class ModelsMover:
    """Moves all shared models of this process. Implements :class:`~shared_store.overcommit.mover.Mover`.

    Attributes:
        failure: why the last return failed, if another attempt is not likely to help.
    """

    def __init__(
        self,
        gate: Gate,
        models: Mapping[nn.Module, SharedModel],
        refusal: Callable[[], str],
        private: Callable[[], Mapping[str, int]],
    ) -> None:
        """Move nothing yet.

        Args:
            gate: of the process.
            models: the shared models, by the modules that ``from_pretrained`` returned; read at each move.
            refusal: tells why the models must not leave; empty if they may.
            private: tells the private bytes on each device while the models are there.
        """
        self._gate = gate
        self._models = models
        self._refusal = refusal
        self._private = private
        self._absence = Absence(gate.passing)
        self._asleep: weakref.WeakKeyDictionary[nn.Module, Sleeper] = weakref.WeakKeyDictionary()
        self._returned_private: dict[str, int] = {}
        self._held = Holdings()
        self._copying = threading.Lock()
        self.failure: WoolyError | None = None

    def copy_ahead(self) -> None:
        """Make host copies of models on GPUs before they are needed, where they fit: the first departure is fast then.

        On a CPU copies are files, which are made when they are needed.
        """
        with self._copying:
            for shared in list(self._models.values()):
                if self._gate.closed or self._refusal() or shared.device.type != "cuda":
                    continue
                try:
                    if (sleeper := shared.sleeper()) is not None:
                        sleeper.copy_ahead()
                except WoolyError as error:
                    log.info("wooly: no host copies of %s ahead: %s [%s]", shared.name, error, error.code)

    def leave(self, *, active: bool, within_s: float, reached: Reached) -> Holdings:
        """Leave, see :meth:`Mover.leave`. Threads wait at the gate from here on."""
        with self._copying:  # of two sleepers of a model, one would release what the other needs
            return self._leave(active, within_s, reached)

    def _leave(self, active: bool, within_s: float, reached: Reached) -> Holdings:
        began = time.monotonic()
        if reason := self._refusal():
            raise DeclinedError(reason)
        if not active and self._gate.in_use:
            raise DeclinedError("its models are in use")
        steps, moved, needs = Steps(), _Count(), dict(self._private())
        sleepers = self._prepared(moved)
        steps.end("copy")
        try:
            left = max(0.001, began + within_s - time.monotonic()) if within_s else 0.0
            self._gate.close(active=active, within_s=left)
            steps.end("drain")
            try:
                self._check(sleepers)
                reached("leaving")
            except BaseException:
                self._open()
                raise
        except BaseException:
            for sleeper in sleepers.values():
                sleeper.stay_awake()
            raise
        self._asleep.update(sleepers)
        for sleeper in sleepers.values():
            try:
                sleeper.sleep()
            except (WoolyError, OSError) as error:  # it counts as asleep, and returns as one that is
                log.warning("wooly: could not take a model off its device completely: %r", error)
        for device in self._devices():
            work_on(device).reclaim()
        steps.end("unmap")
        stays, shared = dict(self._private()), dict[str, int]()
        for model, sleeper in sleepers.items():
            name = store_device(self._models[model].device)
            shared[name] = shared.get(name, 0) + sleeper.nbytes
        self._held = Holdings(stays, stays, needs, moved.nbytes, steps.seconds, shared)
        return self._held

    def come_back(self) -> Holdings:
        """Return, see :meth:`Mover.come_back`. Threads pass the gate again."""
        steps, moved = Steps(), _Count()
        private: dict[str, int] = {}
        self.failure = None
        for model, sleeper in list(self._asleep.items()):
            try:
                woken = sleeper.wake(moved)
            except BaseException as error:
                if isinstance(error, WoolyError) and not isinstance(error, (OutOfMemoryError, *NO_STORE)):
                    self.failure = error
                self._leave_again()
                raise
            device = store_device(self._models[model].device)
            private[device] = private.get(device, 0) + woken.private_bytes
        self._asleep.clear()
        self._returned_private = private
        self._open()
        steps.end("weights")
        return self.holdings(moved.nbytes, steps.seconds)

    def prepare_checkpoint(self) -> None:
        """Decline: the program may call CUDA at any time, and would block. See the interface."""
        raise DeclinedError("code of a program may call CUDA at any time")

    def holdings(self, moved: int = 0, steps: Mapping[str, float] | None = None) -> Holdings:
        """Return the private bytes that the process has now."""
        if self._gate.closed:
            return self._held
        private = dict(self._private())
        for device, nbytes in self._returned_private.items():
            private[device] = private.get(device, 0) + nbytes
        return Holdings(private, private, private, moved, steps or {})

    def _prepared(self, moved: _Count) -> dict[nn.Module, Sleeper]:
        """Return the sleepers of all models, with their host copies made."""
        sleepers: dict[nn.Module, Sleeper] = {}
        try:
            for model, shared in list(self._models.items()):
                if (sleeper := shared.sleeper()) is not None:
                    sleepers[model] = sleeper
                    sleeper.prepare(moved)
        except WoolyError as error:
            for sleeper in sleepers.values():
                sleeper.stay_awake()
            raise DeclinedError(f"{error} [{error.code}]") from error
        if not sleepers:
            raise DeclinedError("it has no shared weights")
        return sleepers

    def _check(self, sleepers: Mapping[nn.Module, Sleeper]) -> None:
        """Replace the registers of all modules, and make sure that nothing else refers to what is about to leave.

        Raises:
            DeclinedError: something does, or weights were changed.
        """
        storages = [storage for model in sleepers for storage in self._models[model].storages()]
        numbers = {storage.number for storage in storages}

        def is_shared(tensor: object) -> bool:
            plain = isinstance(tensor, torch.Tensor) and storage_key(tensor) is not None
            return plain and tensor.untyped_storage()._cdata in numbers  # type: ignore[attr-defined]  # a tensor

        self._absence.begin(_modules(sleepers), is_shared)
        for device in self._devices():
            work_on(device).settle()
        if captures.active:
            raise DeclinedError("a CUDA graph is being captured")
        if found := references_elsewhere(list(self._absence.registers()), is_shared, storages):
            raise DeclinedError(f"weights are referred to from outside of the model: {found}")
        for model in sleepers:
            if written := self._models[model].written_bytes():
                raise DeclinedError(f"this process wrote to {written} bytes of {self._models[model].name}")

    def _leave_again(self) -> None:
        """Take off again what has returned, after another model could not."""
        for sleeper in self._asleep.values():
            if not sleeper.asleep:
                try:
                    sleeper.sleep()
                except WoolyError as error:
                    log.warning("wooly: a model stays on its device: %s [%s]", error, error.code)

    def _open(self) -> None:
        self._absence.end()
        self._gate.open()

    def _devices(self) -> set[torch.device]:
        return {shared.device for shared in self._models.values()}


def _modules(models: Mapping[nn.Module, Sleeper]) -> Iterator[nn.Module]:
    for model in models:
        yield from model.modules()


class _Count:
    """Counts bytes that are copied."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, nbytes: int) -> None:
        self.nbytes += nbytes
