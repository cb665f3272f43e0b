"""A workload of transformers models: its gate, its mover, and the agent that speaks for it.

While a model is loaded the process counts as working, so the models that it has return first, and nothing leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import nn

from shared_store.activity.writer import ActivityWriter
from shared_store.base import envs
from shared_store.base.errors import ConfigError, TimedOutError, UnsupportedError
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.base.workload_states import WorkloadState
from shared_store.client.session import Session
from shared_store.compute import mps
from shared_store.compute import support as compute_support
from shared_store.overcommit import support
from shared_store.overcommit.agent import Agent, connect
from shared_store.protocol.messages.identity import Identity
from shared_store.torch.devices import store_device
from wooly_hf.sharing import stats
from wooly_hf.workload import ranks
from wooly_hf.workload.gate import Gate
from wooly_hf.workload.mover import ModelsMover
from wooly_hf.workload.references import countable
from wooly_hf.workload.shared_model import SharedModel
from wooly_hf.workload.turns import Turns

log = logging.getLogger(__name__)

INTERRUPTED_S: Final = 5.0
"""Seconds after which a call that was interrupted (Ctrl-C) counts no more at the latest."""

KIND: Final = "transformers"

SAY_EVERY_S: Final = 30.0
"""Seconds after which a thread that waits for its models says so again."""

LOOK_EVERY_S: Final = 2.0
"""Seconds after which it looks whether they cannot return."""


class Workload:
    """One for each process.

    Attributes:
        turns: of the device: what other workloads learn of the steps of this one.
        gate: of all models.
        refusal: why the models must not leave; empty if they may.
    """

    def __init__(
        self, name: str, device: torch.device, settings: WorkloadSettings, emptied: Callable[[Workload], None]
    ) -> None:
        """Connect nothing yet.

        Args:
            name: of the workload, where neither the settings nor the environment have one.
            device: of the first model.
            settings: from the arguments of ``from_pretrained``.
            emptied: called when it may have become :attr:`empty`; not in the garbage collector.

        Raises:
            ConfigError: an environment variable has an invalid value, or asks for a cap that would have no effect.
        """
        mps.cap([device.type])
        self._emptied = emptied
        self.settings = settings.completed()
        self.refusal = "" if self.settings.swap else "its user does not let it be swapped out"
        if not self.refusal and device.type == "cuda" and not support.GPUS:
            self.refusal = support.REFUSAL
        if not self.refusal and not countable():
            self.refusal = f"torch {torch.__version__} does not tell the references to tensors"
        self._pid = os.getpid()
        self._shared: weakref.WeakKeyDictionary[nn.Module, SharedModel] = weakref.WeakKeyDictionary()
        self._private: weakref.WeakKeyDictionary[nn.Module, tuple[str, int]] = weakref.WeakKeyDictionary()
        self._loading = 0
        self._closed = threading.Event()
        self._activity = ActivityWriter()
        self._turns_as: str | None = None
        self.turns = Turns(self._changed, device, _ungated(device))
        self.gate = Gate(self._come_back, self._activity, self.turns)
        self._mover = ModelsMover(self.gate, self._shared, lambda: self.refusal, self._private_bytes)
        devices = [store_device(device)]
        self._agent = Agent(
            self._connect, self._mover, kind=KIND, name=name, devices=devices, refusal=self.refusal, settings=settings
        )

    @property
    def id(self) -> str:
        """The id of the workload, for the sessions of its models."""
        return self._agent.workload

    @property
    def name(self) -> str:
        """Its name, unique in the store."""
        return self._agent.name

    @property
    def state(self) -> WorkloadState:
        """Where its memory is."""
        return self._agent.state

    @property
    def alive(self) -> bool:
        """Whether this is the process that joined, and not a forked child of it."""
        return self._pid == os.getpid()

    @property
    def empty(self) -> bool:
        """Whether it has no model, and loads none."""
        return not self._loading and all(found() is None for found in self._private.keyrefs())

    def has(self, model: nn.Module) -> bool:
        """Whether a module is one of the shared models."""
        return model in self._shared

    def models(self) -> list[nn.Module]:
        """Return all models."""
        return list(self._private)

    def join(self) -> None:
        """Join the store. Raises :class:`WoolyError` if there is none."""
        self._agent.join()
        self.turns.start()
        threading.Thread(target=self._look, name="wooly-gate", daemon=True).start()

    def check(self, settings: WorkloadSettings) -> None:
        """Raise :class:`ConfigError` if a later model asks for other settings."""
        own = self.settings
        for name, mine, given in (
            ("wooly_workload", own.workload, settings.workload),
            ("wooly_priority", own.priority, settings.priority),
            ("wooly_swap", own.swap, settings.swap),
            ("wooly_compute_share", own.compute_share, settings.compute_share),
            ("wooly_exclusive", own.exclusive, settings.exclusive),
        ):
            if given is not None and given != mine:
                raise ConfigError(
                    f"{name}={given!r}: all models of a process are one workload, which has {name}={mine!r} since its "
                    "first model; give the same value, or none"
                )

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """A context for a load. Begins to be resident in the end, however the load ends."""
        self._loading += 1
        try:
            with self.gate.using():
                try:
                    yield
                finally:
                    self._agent.joined_resident(self._mover.holdings())
                    self._take_turns()
            threading.Thread(target=self._mover.copy_ahead, name="wooly-copies-ahead", daemon=True).start()
        finally:
            self._loading -= 1
            self._emptied(self)

    def _take_turns(self) -> None:
        """Tell the store once that this workload takes part in turns, and again when the process became a rank."""
        ungated = self.turns.ungated
        if self._turns_as != ungated:
            self._turns_as = ungated
            self._agent.compute(self.turns.gate, ungated)

    def _changed(self) -> None:
        """Steps may begin again."""
        self.gate.changed()

    def take_memory(self, device: torch.device, nbytes: int) -> None:
        """Wait until a model may be loaded onto a device, in a load.

        Raises:
            TimedOutError: there was no memory in ``WOOLY_START_TIMEOUT``.
            OutOfMemoryError: there will never be so much.
        """
        if device.type == "cuda" and not support.GPUS:
            return
        limit_s = envs.START_TIMEOUT.get()
        self._agent.take_room({store_device(device): nbytes}, limit_s, self._say)

    def add(self, model: nn.Module, shared: SharedModel) -> None:
        """Take up a shared model."""
        self._shared[model] = shared
        self.add_private(model, shared.device)

    def add_private(self, model: nn.Module, device: torch.device) -> None:
        """Take up a model that is not shared."""
        if model not in self._private:
            weakref.finalize(model, self._ended).atexit = False
        self._private[model] = (store_device(device), stats(model).private_bytes)

    def measure(self, model: nn.Module) -> None:
        """Measure and report the private bytes of a model again, which its user may have changed."""
        if model in self._private:
            self._private[model] = (self._private[model][0], stats(model).private_bytes)
            self._agent.changed(self._mover.holdings())

    def refuse(self, reason: str) -> None:
        """Stay from here on. Only the first reason counts."""
        if not self.refusal:
            self.refusal = reason
            log.info("wooly: %s is not swapped out from here on: %s", self.name, reason)
            self._agent.refuse(reason)

    def close(self) -> None:
        """Leave the store."""
        self._closed.set()
        if self.alive:
            self.turns.close()
            self._agent.close()

    def _look(self) -> None:
        """See that a call that was interrupted does not count as work for long."""
        while not self._closed.wait(INTERRUPTED_S):
            self.gate.look()
            if self._turns_as is not None:
                self._take_turns()

    def _come_back(self) -> None:
        """Wait until the models are back."""
        if not self.alive:
            raise UnsupportedError(
                "this process was forked while the models of its parent were swapped out; start it by spawn, or fork "
                "it inside of a call of the model"
            )
        said = time.monotonic()
        try:
            while not self._is_back():
                if time.monotonic() - said >= SAY_EVERY_S:
                    said = time.monotonic()
                    log.warning("wooly: %s waits for its models. %s", self.name, self._agent.explain())
        except BaseException:
            self._agent.unwanted()
            raise

    def _is_back(self) -> bool:
        """Wait for the models, for some time. Raises the error of a return that cannot succeed."""
        try:
            self._agent.ensure_resident(LOOK_EVERY_S)
        except TimedOutError as error:
            if self._mover.failure is not None:
                raise self._mover.failure from error
            return False
        return True

    def _connect(self, identity: Identity) -> Session:
        session = connect(identity)
        session.report_activity(self._activity)
        return session

    def _private_bytes(self) -> Mapping[str, int]:
        """Return private bytes by device: on a GPU all that torch has, on a CPU private tensors of the models."""
        found: dict[str, int] = {}
        for device, nbytes in list(self._private.values()):
            found[device] = found.get(device, 0) + nbytes
        for shared in list(self._shared.values()):
            if shared.device.type == "cuda":
                found[store_device(shared.device)] = torch.cuda.memory_reserved(shared.device)
        return found

    def _say(self, reason: str) -> None:
        log.warning("wooly: %s waits for memory to load a model: %s", self.name, reason)

    def _ended(self) -> None:
        """A model was collected: with the last one the workload ends. The collector may run in any thread."""
        if self.alive and self.empty:
            threading.Thread(target=self._emptied, args=(self,), name="wooly-end", daemon=True).start()


def _ungated(device: torch.device) -> str:
    """Return why steps on a device are never held; empty if they may be."""
    if device.type == "cuda" and not compute_support.GPUS:
        return compute_support.UNGATED
    return ranks.reason()
