"""Carries out effects of the state: answers waiting clients, tells the keeper, and releases memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shared_store.base.errors import WoolyError
from shared_store.store.devices.devices import Devices
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.state.effects import Effect, Forgotten, Left, Released, Relocated
from shared_store.store.waiting import Waiters


@dataclass(frozen=True, eq=False)
class Effects:
    """Connects the state to the process around it. Callers carry effects out before they await anything else.

    ``_left`` is called with the id of a segment that left its device once its memory there is released.
    """

    _devices: Devices
    _keeper: KeeperLink
    _waiters: Waiters
    _left: Callable[[int], None]

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out all effects, in order. An error of one is raised after the others were carried out.

        After an error the keeper retains released segments: it may not know where their blobs are now.
        """
        errors: list[WoolyError] = []
        for effect in effects:
            try:
                self._carry_out(effect, retain=bool(errors))
            except WoolyError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _carry_out(self, effect: Effect, *, retain: bool) -> None:
        match effect:
            case Released(segment):
                freed = self._devices.release(segment)
                if not retain:
                    self._keeper.release(segment, freed)
            case Left(segment):
                self._keeper.vacate(segment, self._devices.release(segment))
                self._left(segment)
            case Forgotten(key):
                self._keeper.forget(key)
            case Relocated(key):
                self._keeper.note(key)
            case _:
                self._waiters.answer(effect)
