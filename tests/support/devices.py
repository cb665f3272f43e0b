"""A device beside host memory, and made of it: as a GPU, it does not seal, and the store cannot read it.

Processes that have :data:`ENVIRONMENT` know it by its name: a store, a keeper's store, a client.
"""

from __future__ import annotations

import os
from pathlib import Path

from shared_store.memory import Unknown
from shared_store.memory.fake import FakeBackend

DEVICE = "GPU-test"

_SITE = Path(__file__).with_name("device_site")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(_SITE), str(_SITE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    )
}


class Device(FakeBackend):
    """Its backend."""

    host_readable = False

    def __init__(self, device=DEVICE):
        super().__init__(device, seals=False)


class Unmeasured(Device):
    """A device of which nobody can tell how much memory is free, as a GPU without NVML; allocating finds out."""

    def free_bytes(self):
        return Unknown("NVML is not installed")
