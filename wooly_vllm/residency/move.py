"""The move of one worker's memory off its device and back."""

from __future__ import annotations

from typing import Any


class Mover:
    """Moves the memory of one worker."""

    @classmethod
    def of(cls, worker: Any) -> Mover:
        """Return the worker's mover."""
        raise NotImplementedError

    def holdings(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_holdings`."""
        raise NotImplementedError

    def prepare(self, blocks: int) -> str:
        """See :func:`~.worker.wooly_prepare_leave`."""
        raise NotImplementedError

    def save(self, block_ids: list[int]) -> str:
        """See :func:`~.worker.wooly_save`."""
        raise NotImplementedError

    def leave(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_leave`."""
        raise NotImplementedError

    def stay(self) -> None:
        """See :func:`~.worker.wooly_stay`."""
        raise NotImplementedError

    def create(self) -> str:
        """See :func:`~.worker.wooly_create`."""
        raise NotImplementedError

    def fill(self) -> dict[str, Any]:
        """See :func:`~.worker.wooly_fill`."""
        raise NotImplementedError

    def roll_back(self) -> None:
        """See :func:`~.worker.wooly_roll_back`."""
        raise NotImplementedError
