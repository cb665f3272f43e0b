"""The manifest of a committed model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shared_store.base.keys import host_key
from shared_store.base.manifest import Manifest


@dataclass
class Committed:
    """A committed model's manifest, encoded and decoded."""

    data: bytes
    manifest: Manifest

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a private copy of the model's tensors."""
        return self.manifest.nbytes

    @cached_property
    def host_key(self) -> str:
        """Key of the model's host copy, whether or not it exists."""
        return host_key(self.manifest.key, (blob.digest for blob in self.manifest.blobs))
