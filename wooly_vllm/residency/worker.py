"""Methods of vLLM's workers that move private memory and shared weights off the device and back.

The engine calls them on all its workers by ``collective_rpc``, by name, at a step boundary and with no step in flight.
Arguments and results are plain values. None raises for an expected failure: it returns the reason, so that all workers
answer and the engine can decide for all of them.

A move away, for all workers at once::

    wooly_prepare_leave(blocks)   while steps may still run: host copies of weights exist, memory for copies is there
    wooly_save(block_ids)         no step in flight: copies of private memory; nothing is unmapped
    wooly_leave()                 if every worker saved: unmap everything
    wooly_stay()                  otherwise: drop the copies; everything is in place

and back::

    wooly_create()                map everything; a worker that fails has unmapped what it mapped
    wooly_fill()                  if every worker mapped: copy the contents back
    wooly_roll_back()             otherwise: unmap again; the copies are kept

"""

from __future__ import annotations

from typing import Any

from wooly_vllm.residency.move import Mover


def wooly_holdings(worker: Any) -> dict[str, Any]:
    """Return the worker's private memory, in bytes.

    Keys: ``device`` (``cpu`` or a GPU's UUID); ``private``: on it now; ``stays``: those that a swap does not free;
    ``needs``: on it when resident; ``block_bytes``: of one KV block of this worker, all layers; ``copy_room``: most
    bytes that copies may take now; ``refusal``: why this worker cannot leave, or "".
    """
    return Mover.of(worker).holdings()


def wooly_prepare_leave(worker: Any, blocks: int = 0) -> str:
    """Make host copies of shared weights, and check that copies of ``blocks`` KV blocks fit. Idempotent.

    Steps may run meanwhile. Returns "" or the reason why the worker cannot leave.
    """
    return Mover.of(worker).prepare(blocks)


def wooly_save(worker: Any, block_ids: list[int]) -> str:
    """Copy these KV blocks and the other private memory off the device. Returns "" or a reason; nothing is unmapped.

    No step is in flight. Blocks that are not named are zero when the worker is back.
    """
    return Mover.of(worker).save(block_ids)


def wooly_leave(worker: Any) -> dict[str, Any]:
    """Unmap private memory and shared weights, after :func:`wooly_save` returned "" on every worker.

    Returns ``private`` (bytes left on the device), ``moved`` (bytes copied), ``steps`` (seconds by step) and ``error``:
    "", or why everything is still in place.
    """
    return Mover.of(worker).leave()


def wooly_stay(worker: Any) -> None:
    """Drop copies of :func:`wooly_save` and host copies of :func:`wooly_prepare_leave`. The worker goes on."""
    Mover.of(worker).stay()


def wooly_create(worker: Any) -> str:
    """Map private memory and shared weights, empty where :func:`wooly_fill` has not run.

    Returns "", or the reason why nothing could be mapped: everything that was is unmapped again. Idempotent.
    """
    return Mover.of(worker).create()


def wooly_fill(worker: Any) -> dict[str, Any]:
    """Copy the contents back, after :func:`wooly_create` returned "" on every worker. Steps may run afterwards.

    Returns ``private`` (bytes on the device), ``moved``, ``steps``, and ``lost``: "", or why the copies of KV blocks
    are not usable. All blocks are zero then: the engine drops every prefix and computes its running requests again.
    """
    return Mover.of(worker).fill()


def wooly_roll_back(worker: Any) -> None:
    """Unmap again what :func:`wooly_create` mapped, as another worker could not. The copies are kept. Idempotent."""
    Mover.of(worker).roll_back()


METHODS = (
    wooly_holdings,
    wooly_prepare_leave,
    wooly_save,
    wooly_leave,
    wooly_stay,
    wooly_create,
    wooly_fill,
    wooly_roll_back,
)
"""What workers get, under the functions' names."""
