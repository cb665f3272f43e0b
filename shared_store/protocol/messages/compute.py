"""Messages about compute: what joins the arbiter, and shares. Only for stores with the capability ``compute``."""

from __future__ import annotations

from shared_store.protocol.messages.envelope import Reply, Request

COMPUTE = "compute"
"""The capability of stores that answer these messages."""

EXCLUSIVE = "exclusive"
"""The capability of stores that refuse workloads beside one that is alone on its devices (``Identity.exclusive``)."""

SETTINGS = "workload_settings"
"""The kind of the push to a workload whose priority or share was set. Its detail has both, in this order."""


class JoinCompute(Request, frozen=True, tag="join_compute", omit_defaults=True):
    """Let a workload that has joined take part in turns of its devices. Answered by :class:`ComputeJoined`.

    A further request replaces page and socket: the arbiter was lost. ``ungated``: why the workload must never be held;
    empty: it may be. It counts for the others all the same.
    """

    workload: str
    ungated: str = ""


class ComputeJoined(Reply, frozen=True, tag="compute_joined"):
    """The message carries the fds of the compute page and of a socket to the arbiter, in this order."""


class SetShare(Request, frozen=True, tag="set_share"):
    """Set a workload's share of its devices' time among equals, by its name. Answered by ``Done``.

    ``percent``: 1 to 100; 0: an equal part of what the others leave.
    """

    name: str
    percent: float
