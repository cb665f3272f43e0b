"""Requests of the store that a workload carries out."""

from __future__ import annotations

from shared_store.protocol.messages.envelope import StoreRequest


class SwapOut(StoreRequest, frozen=True, tag="swap_out"):
    """Leave the GPUs: unmap shared weights and move private memory to the host. Answered by :class:`Done` once it is.

    A client that cannot or may not answers ``Failed`` (``declined``) with the reason; one without a handler
    ``Failed`` (``unsupported``). ``reason`` is for people. The store withdraws the request after ``within_s`` seconds;
    0: it waits.
    """

    reason: str
    within_s: float = 0.0
