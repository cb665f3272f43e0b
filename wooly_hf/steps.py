"""transformers' steps of loading a shared model; :func:`shared_store.torch.load.load` calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import nn

from shared_store.base import envs
from shared_store.base.errors import UnsupportedError, WoolyError
from shared_store.base.manifest import Manifest
from shared_store.client.identify import Checkpoint
from shared_store.torch.bind import Bound
from shared_store.torch.devices import store_device
from shared_store.torch.fallback import Fallback
from shared_store.torch.load import SHARE_MIN_BYTES, Settings
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.steps import Description, Identity, Loaded, Shared
from shared_store.torch.tensors import NamedTensor
from wooly_hf import compat, guards, identity
from wooly_hf.attach import attach
from wooly_hf.sharing import leave_files
from wooly_hf.workload.entrances import guard
from wooly_hf.workload.shared_model import SharedModel
from wooly_hf.workload.workload import Workload

log = logging.getLogger(__name__)

Result: TypeAlias = tuple[Any, Any]
"""What ``_load_pretrained_model`` returns: its ``LoadStateDictInfo``, and the index of offloaded weights or None."""

publishing: ContextVar[bool] = ContextVar("wooly_publishing", default=False)
"""True while transformers loads a model that will be published."""


def settings(load_config: Any = None) -> Settings:
    """Return how this process loads, by its environment. ``load_config``: of the model, if its device is known."""
    advice = "Set WOOLY_STRICT=1 to make this an error."
    return Settings(
        "transformers",
        compat.version(),
        Fallback(not envs.STRICT.get(), advice, log),
        devices=() if load_config is None else _devices(load_config),
    )


def _devices(load_config: Any) -> tuple[str, ...]:
    """Return the store's name of the model's device; empty if it cannot be shared, which :meth:`identify` reports."""
    with suppress(UnsupportedError):
        device = compat.device_of(load_config)
        if device.type != "cuda" or torch.cuda.is_available():
            return (store_device(device),)
    return ()


class NoMemoryError(Exception):
    """No memory was to be had for a load. Not a fallback: loading the stock way would need as much."""

    def __init__(self, reason: WoolyError) -> None:
        """Keep the reason, which is what the user sees."""
        super().__init__(str(reason))
        self.reason = reason


class TransformersSteps:
    """The steps of one call of ``_load_pretrained_model``."""

    def __init__(
        self,
        model: nn.Module,
        state_dict: Any,
        files: list[str] | None,
        load_config: Any,
        load_stock: Callable[[], Result],
    ) -> None:
        """Take the call's arguments. ``load_stock``: makes the call as transformers would."""
        self._model = model
        self._state_dict = state_dict
        self._files = files
        self._load_config = load_config
        self._load_stock = load_stock
        self._workload: Workload | None = None
        self._device = torch.device("cpu")

    def join(self, workload: Workload, device: torch.device) -> None:
        """Load the model as one of a workload, onto a device."""
        self._workload, self._device = workload, device

    @property
    def name(self) -> str:
        """The checkpoint's name or path."""
        return str(self._load_config.pretrained_model_name_or_path)

    @property
    def loads_ahead(self) -> bool:
        """False: transformers loads into a model that exists, which cannot be attached to afterwards."""
        return False

    def prepare(self) -> None:
        """Do nothing: everything is checked in :meth:`identify`, so that the store counts refusals."""

    def sharing(self) -> AbstractContextManager[None]:
        """Return an empty context."""
        return nullcontext()

    def identify(self) -> Identity:
        """Check that the model can be shared, and collect the facts of the weight key."""
        compat.check_supported(self._state_dict, self._files, self._load_config)
        device = compat.device_of(self._load_config)
        files = identity.named_files(self._files or ())
        facts = identity.facts(self._model, files, self._load_config, device)
        return Identity(device, Checkpoint(files), facts)

    def attach(self, manifest: Manifest, mapped: MappedModel) -> tuple[Loaded[Result], Bound]:
        """Set the manifest's tensors on the model, and what else loading would have left on it."""
        bound = attach(self._model, manifest, mapped, min_bytes=SHARE_MIN_BYTES)
        info = compat.restore(self._model, self._load_config, manifest.state)
        return Loaded(self._model, (info, None)), bound

    def load_to_publish(self) -> Loaded[Result]:
        """Load the stock way, without the warm-up of the allocator, once there is memory for it.

        Raises:
            NoMemoryError: there is none; nothing is loaded then.
        """
        if self._workload is not None:
            try:
                self._workload.take_memory(self._device, compat.nbytes_of(self._model))
            except WoolyError as error:
                raise NoMemoryError(error) from error
        token = publishing.set(True)
        try:
            return Loaded(self._model, self._load_stock())
        finally:
            publishing.reset(token)

    def discard(self, loaded: Loaded[Result]) -> None:
        """Do nothing: no model is loaded ahead."""

    def describe(self, loaded: Loaded[Result]) -> Description:
        """Describe the outcome of the load, and select the tensors that came from the checkpoint."""
        info, _ = loaded.result
        state = compat.outcome(self._model, self._load_config, info)
        from_checkpoint = set(self._model.state_dict()) - info.missing_and_mismatched()

        def select(named: NamedTensor) -> bool:
            return named.kind != "attribute" and named.persistent and named.path in from_checkpoint

        return Description(state, select)

    def bound(self, shared: Shared[Result]) -> Bound:
        """Release the checkpoint's files, and guard shared tensors against writes."""
        if shared.published and shared.manifest.device == "cpu":
            leave_files(self._model)
        guards.watch(self._model)
        if self._workload is not None:
            self._workload.add(self._model, SharedModel(shared, self._device, shared.bound.private_bytes))
            guard(self._model, self._workload, leaves=self._workload.settings.swap)
        return shared.bound

    def left_private(self, loaded: Loaded[Result]) -> None:
        """The model is as transformers loaded it, and stays where it is."""
        self._stays_private(loaded.model)

    def load_stock(self) -> Result:
        """Load as transformers does."""
        result = self._load_stock()
        self._stays_private(self._model)
        return result

    def _stays_private(self, model: nn.Module) -> None:
        if self._workload is not None:
            self._workload.add_private(model, self._device)
            guard(model, self._workload, leaves=False)
            self._workload.refuse("a model of it is not shared, so nothing else has its weights")
