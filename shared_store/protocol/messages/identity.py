"""A client's own description of its process: part of the greeting, shown in the status, and never trusted.

The kernel says which uid and groups a client has. What it says here decides nothing that a uid may not do.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from shared_store.base.text import one_line

KINDS: Final = ("vllm", "transformers", "cli", "other")
"""Kinds of clients. A kind that this version does not know counts as ``other``."""

PRIORITIES: Final = range(5)
"""P0 (highest) to P4."""

MAX_NAME: Final = 200
"""Characters of a name; the rest is cut."""

MAX_GPUS: Final = 16
"""GPUs of one process; the rest is dropped. A greeting has at most 4 KiB."""

MAX_SHARE: Final = 100.0
"""Percent."""

_LABEL: Final = 63  # of a namespace or container, as Kubernetes limits them
_SUBDOMAIN: Final = 253  # of a pod
_GPU: Final = re.compile(r"(GPU|MIG)-[0-9A-Za-z-]{1,60}")


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """A process, as it describes itself.

    Attributes:
        name: of the workload that it belongs to; empty: the client's own name.
        kind: one of :data:`KINDS`.
        priority: 0 (highest) to 4.
        swap: False if its memory must not be swapped out for others.
        gpus: UUIDs of the GPUs that it uses.
        namespace: in a Kubernetes pod, the pod's namespace.
        pod: the pod's name.
        container: the container's name.
        member_of: the id of the workload whose process this is, the same in all of its processes; empty: none.
        share: of its devices' time among workloads of its priority, in percent; 0: an equal part.
        exclusive: True if no other workload may use its devices.
    """

    name: str = ""
    kind: str = "other"
    priority: int = 0
    swap: bool = True
    gpus: tuple[str, ...] = ()
    namespace: str = ""
    pod: str = ""
    container: str = ""
    member_of: str = ""
    share: float = 0.0
    exclusive: bool = False

    def cleaned(self) -> Identity:
        """Return a copy whose texts are printable and of bounded length, with values in their ranges."""
        return Identity(
            one_line(self.name, MAX_NAME),
            self.kind if self.kind in KINDS else "other",
            min(max(self.priority, PRIORITIES[0]), PRIORITIES[-1]),
            self.swap,
            tuple(gpu for gpu in self.gpus[:MAX_GPUS] if _GPU.fullmatch(gpu)),
            one_line(self.namespace, _LABEL),
            one_line(self.pod, _SUBDOMAIN),
            one_line(self.container, _LABEL),
            one_line(self.member_of, _LABEL),
            self.share if 1 <= self.share <= MAX_SHARE else 0.0,
            self.exclusive,
        )

    @property
    def place(self) -> str:
        """``namespace/pod/container``, as far as they are known; empty outside of Kubernetes."""
        return "/".join(part for part in (self.namespace, self.pod, self.container) if part)
