"""Moves one engine with all its workers: the engine's side of :mod:`wooly_vllm.residency.worker`.

All workers move or none does: each step of a move is taken on all of them before the next one, and undone on all if
one cannot take it. Workers answer with a reason instead of raising, so that every worker's state is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from shared_store.base.errors import DeclinedError, OutOfMemoryError, WoolyError
from shared_store.overcommit.mover import Holdings, Reached, Steps
from wooly_vllm import compat
from wooly_vllm.residency import blocks
from wooly_vllm.residency.boundary import deadline
from wooly_vllm.residency.gate import Gate

T = TypeVar("T")


class EngineMover:
    """The :class:`~shared_store.overcommit.mover.Mover` of an engine. Before :meth:`attach`, it has nothing to move."""

    def __init__(self) -> None:
        """Begin without an engine."""
        self._gate: Callable[[], Gate | None] = lambda: None
        self._refusal = ""
        self._pinned = True

    def attach(self, gate: Gate, refusal: str) -> None:
        """Move the engine behind this gate from here on, unless there is a reason against it. Keeps neither alive."""
        self._gate, self._refusal = weakref.ref(gate), refusal

    def leave(self, *, active: bool, within_s: float, reached: Reached) -> Holdings:
        """Stop at a step boundary, and leave the devices. See the interface."""
        gate, late = self._attached(), deadline(within_s)
        if self._refusal:
            raise DeclinedError(self._refusal)
        return gate.boundary.run(
            lambda: _whole(gate, lambda: self._leave(gate, late, reached, active=active)), within_s
        )

    def come_back(self) -> Holdings:
        """Return to the devices. See the interface."""
        gate = self._attached()
        return gate.boundary.run(lambda: _whole(gate, lambda: self._come_back(gate)))

    def prepare_checkpoint(self) -> None:
        """Unregister host memory of all workers from the driver. See the interface."""
        gate = self._attached()
        if not gate.away:
            raise DeclinedError("the engine is not away")
        self._pinned = False
        gate.boundary.run(lambda: _whole(gate, lambda: self._unpin(gate.engine)))

    @staticmethod
    def _unpin(engine: Any) -> None:
        reasons = _reasons(_rpc(engine, "wooly_unpin"))
        if reasons:
            raise DeclinedError(f"a worker cannot unregister host memory: {reasons[0]}")

    def holdings(self) -> Holdings:
        """Return the bytes that all workers have now."""
        gate = self._gate()
        if gate is None:
            return Holdings()
        try:
            return gate.boundary.run(lambda: holdings(gate))
        except (NotImplementedError, AttributeError, RuntimeError):
            if not self._refusal:
                raise
            return Holdings()  # its workers may be of any kind

    def _attached(self) -> Gate:
        gate = self._gate()
        if gate is None:
            raise DeclinedError("the engine has not started yet, or ends")
        return gate

    def _leave(self, gate: Gate, late: Callable[[], bool], reached: Reached, *, active: bool) -> Holdings:
        if gate.away:
            return holdings(gate)
        engine, steps = gate.engine, Steps()
        if engine.model_executor.is_sleeping and engine.vllm_config.model_config.enable_sleep_mode:
            raise DeclinedError("its user put this engine to sleep")
        if not active and gate.has_work():
            raise DeclinedError("it has requests")
        pool = engine.scheduler.kv_cache_manager.block_pool
        _agree(gate, _rpc(engine, "wooly_prepare_leave", len(blocks.used_ids(pool))))
        if late():
            _rpc(engine, "wooly_stay")
            raise DeclinedError("preparing host copies took too long; they are there for the next time")
        steps.end("prepare")
        gate.close()
        steps.end("drain")
        try:
            reached("leaving")
            kept = blocks.choose(pool, _blocks_that_fit(engine))
            _agree(gate, _rpc(engine, "wooly_save", kept.ids))
        except BaseException:
            gate.open()
            raise
        blocks.drop(pool, kept.dropped)  # their contents are lost, too, if a worker that cannot leave is brought back
        try:
            left = self._unmap(engine)
        except DeclinedError:
            gate.open()
            raise
        except BaseException as error:
            gate.fail(error)
            raise
        gate.shut()
        compat.logger().info(
            "wooly: this engine left its devices: %d KV blocks kept (%d of them of running requests), %d dropped",
            len(kept.ids),
            kept.running,
            len(kept.dropped),
        )
        return holdings(gate, steps.seconds, left)

    def _unmap(self, engine: Any) -> list[dict[str, Any]]:
        """Unmap everything on all workers. If one fails, bring the others back; if that fails too, all stay away.

        Raises:
            DeclinedError: everything is in place.
        """
        left = _rpc(engine, "wooly_leave")
        errors = [worker["error"] for worker in left if worker["error"]]
        if not errors:
            return left
        reasons = _reasons(_rpc(engine, "wooly_create"))
        if not reasons:
            self._fill(engine)
            raise DeclinedError(f"a worker could not leave its device: {errors[0]}")
        _rpc(engine, "wooly_roll_back")
        compat.logger().warning(
            "wooly: a worker could not leave its device (%s), and others cannot return (%s): all return later",
            errors[0],
            reasons[0],
        )
        return left

    def _come_back(self, gate: Gate) -> Holdings:
        if not gate.away:
            return holdings(gate)
        engine, steps = gate.engine, Steps()
        reasons = _reasons(_rpc(engine, "wooly_create"))
        if reasons:
            _rpc(engine, "wooly_roll_back")
            raise OutOfMemoryError(f"this engine cannot return to its devices yet: {reasons[0]}")
        steps.end("map")
        if not self._pinned:
            self._pinned = True
            _rpc(engine, "wooly_pin")
            steps.end("pin")
        try:
            filled = self._fill(engine)
        except BaseException as error:
            gate.fail(error)
            raise
        steps.end("fill")
        gate.open()
        compat.logger().info("wooly: this engine is back on its devices after %.3f s", sum(steps.seconds.values()))
        return holdings(gate, steps.seconds, filled)

    @staticmethod
    def _fill(engine: Any) -> list[dict[str, Any]]:
        """Copy contents back on all workers. If copies of KV blocks are lost, let requests compute them again."""
        filled = _rpc(engine, "wooly_fill")
        lost = [worker["lost"] for worker in filled if worker["lost"]]
        if lost:
            compat.logger().warning(
                "wooly: copies of KV blocks cannot be used (%s): running requests are computed again", lost[0]
            )
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            blocks.drop_all(engine.scheduler.kv_cache_manager.block_pool)  # in case a block was in use in spite of it
        return filled


def _whole(gate: Gate, move: Callable[[], T]) -> T:
    """Make a move. After an error that no worker answered, an engine with several workers computes nothing any more.

    Their executor stops to read answers at the first worker that raises: it would take the others' for those to later
    calls.
    """
    try:
        return move()
    except WoolyError:
        raise
    except Exception as error:
        if gate.engine.vllm_config.parallel_config.world_size > 1:
            gate.fail(error)
        raise


def _rpc(engine: Any, method: str, *args: Any) -> list[Any]:
    """Call a method on all workers."""
    found: list[Any] = engine.model_executor.collective_rpc(method, args=args)
    return found


def _reasons(answers: Iterable[str]) -> list[str]:
    return [reason for reason in answers if reason]


def _agree(gate: Gate, answers: Iterable[str]) -> None:
    """Let all workers go on in place if one has a reason against the next step. Raises :class:`DeclinedError`."""
    reasons = _reasons(answers)
    if reasons:
        _rpc(gate.engine, "wooly_stay")
        raise DeclinedError(f"a worker cannot leave its device: {reasons[0]}")


def _blocks_that_fit(engine: Any) -> int:
    """Return the number of KV blocks of which every worker may keep copies."""
    workers = _rpc(engine, "wooly_holdings")
    return min((int(it["copy_room"] // it["block_bytes"]) for it in workers if it["block_bytes"]), default=0)


def holdings(gate: Gate, steps: Mapping[str, float] | None = None, moved: Iterable[Mapping[str, Any]] = ()) -> Holdings:
    """Add up what all workers have.

    Args:
        gate: of the engine.
        steps: seconds of the last move.
        moved: what the workers said about it; the slowest one's steps count.
    """
    times: dict[str, float] = dict(steps or {})
    copied = 0
    for worker in moved:
        copied += int(worker["moved"])
        for step, seconds in worker["steps"].items():
            times[step] = max(times.get(step, 0.0), float(seconds))
    sums: dict[str, dict[str, int]] = {"private": {}, "stays": {}, "needs": {}, "shared": {}}
    for worker in _rpc(gate.engine, "wooly_holdings"):
        for name, devices in sums.items():
            devices[worker["device"]] = devices.get(worker["device"], 0) + int(worker[name])
    return Holdings(sums["private"], sums["stays"], sums["needs"], copied, times, sums["shared"])
