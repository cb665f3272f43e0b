"""A device beside host memory, and made of it: as a GPU, it does not seal, and the store cannot read it.

Processes that have :data:`ENVIRONMENT` know it by its name: a store, a keeper's store, a client. With
:func:`limited` they share its memory, too: a segment uses it until no process has it any more.
"""

from __future__ import annotations

import json
import os
import secrets
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
_LIMITED = "TEST_DEVICE"


def limited(capacity, *, free="known"):
    """Return the environment of processes that share a device with a capacity. ``free``: `known`, `unknown`."""
    return {**ENVIRONMENT, _LIMITED: json.dumps([capacity, 1 + secrets.randbelow(1 << 61), free])}


class Device(FakeBackend):
    """Its backend."""

    host_readable = False

    def __init__(self, device=DEVICE):
        capacity, tag, self._free = json.loads(os.environ.get(_LIMITED, "[1099511627776, null, null]"))
        super().__init__(device, capacity, seals=False, tag=tag)

    def free_bytes(self):
        """Estimate the bytes left of the capacity, unless they are unknown."""
        return Unknown("a test") if self._free == "unknown" else super().free_bytes()

    def sealed(self, segment):  # noqa: ARG002 - the interface's
        """There is nothing to do."""
        return True


class Unmeasured(Device):
    """A device of which nobody can tell how much memory is free, as a GPU without NVML; allocating finds out."""

    def free_bytes(self):
        return Unknown("NVML is not installed")
