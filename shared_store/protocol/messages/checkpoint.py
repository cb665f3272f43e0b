"""Messages about the deep tier: a helper beside a workload takes the workload's processes off their GPU, and back.

The helper is a client of its own, with the workload's uid. It is asked only while the workload is swapped: shared and
exported memory is unmapped then. Only for stores with the capability ``checkpoints``.
"""

from __future__ import annotations

from shared_store.protocol.messages.envelope import Request, StoreRequest

CHECKPOINTS = "checkpoints"
"""The capability of stores that answer :class:`OfferCheckpoints`."""


class OfferCheckpoints(Request, frozen=True, tag="offer_checkpoints", omit_defaults=True):
    """Offer to checkpoint a workload that has joined. Answered by ``Done``; again to a restarted store.

    ``workload``: its id. ``off``: its processes are off the GPU now. ``refusal``: why they cannot be taken off, for
    people; nothing is asked then.
    """

    workload: str
    off: bool = False
    refusal: str = ""


class PrepareCheckpoint(StoreRequest, frozen=True, tag="prepare_checkpoint"):
    """Unregister host memory from the driver, so that the process can be checkpointed. For the workload's own client.

    Answered by ``Done``; from there on nothing but a return calls CUDA. ``Failed`` (``declined``): it returns, say.
    """


class Checkpoint(StoreRequest, frozen=True, tag="checkpoint"):
    """Take the workload's processes off the GPU. Answered by ``Done`` once they are.

    ``Failed`` (``declined``): they run, and nothing changed. The helper stops trying after ``within_s`` seconds.
    """

    within_s: float


class Restore(StoreRequest, frozen=True, tag="restore"):
    """Bring the workload's processes back to the GPU. The memory is reserved. Answered by ``Done`` once they run.

    ``Failed``: they are still off the GPU, and may be asked again.
    """
