"""One shared model of this process: what is needed to take it off its device, without keeping any of it alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.devices import backend_of
from shared_store.torch.load import TIMEOUT_S
from shared_store.torch.mapping_registry import mapping_of
from shared_store.torch.reach import tensors_from
from shared_store.torch.steps import Shared
from wooly_hf.workload.references import WeakStorage


class SharedModel:
    """The memory of one model. Its tensors keep it mapped, this object does not: copies may have replaced them all.

    Attributes:
        name: the model's.
        device: torch's name of its device.
    """

    def __init__(self, shared: Shared[Any], device: torch.device, private_bytes: int) -> None:
        """Describe a model that was attached or published.

        Args:
            shared: the model.
            device: of its weights.
            private_bytes: bytes of it that this process reports as private.
        """
        self.name = shared.manifest.name
        self.device = device
        self._session = shared.session
        self._manifest = shared.manifest
        self._places, self._segments = shared.mapped.places, shared.mapped.segments
        self._mappings = [(index, weakref.ref(mapping)) for index, mapping in shared.mapped.mappings()]
        self._private_bytes = private_bytes
        self._storages = [WeakStorage(storage) for storage in _shared_storages(shared.loaded.model)]

    def storages(self) -> list[WeakStorage]:
        """Return the storages in shared memory that are still in use."""
        self._storages = [storage for storage in self._storages if storage.alive]
        return self._storages

    def written_bytes(self) -> int:
        """Return the bytes that became private because this process wrote to them; 0 where it cannot."""
        return sum(mapping.private_bytes() for _, found in self._mappings if (mapping := found()) is not None)

    def sleeper(self) -> Sleeper | None:
        """Return the sleeper of what is still shared; None if nothing is. It keeps the mappings alive."""
        mappings = [(index, mapping) for index, found in self._mappings if (mapping := found()) is not None]
        if not mappings:
            return None
        return Sleeper(
            self._session,
            self._manifest,
            self._places,
            self._segments,
            mappings,
            backend_of(self.device),
            private_bytes=self._private_bytes,
            timeout_s=TIMEOUT_S,
        )


def _shared_storages(model: nn.Module) -> Iterator[torch.UntypedStorage]:
    """Yield each storage of a model's tensors that lies in shared memory."""
    seen = set()
    for _, tensor in tensors_from(model):
        if mapping_of(tensor) is not None and (storage := tensor.untyped_storage())._cdata not in seen:
            seen.add(storage._cdata)
            yield storage
