"""Effects of a change of the state, as values. :class:`shared_store.store.effects.Effects` carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import WoolyError


@dataclass(frozen=True)
class MayPublish:
    """``client`` publishes the model ``key``."""

    key: str
    client: int


@dataclass(frozen=True)
class MayRead:
    """``client`` reads the model ``key`` from now on."""

    key: str
    client: int


@dataclass(frozen=True)
class Refused:
    """The wait of ``client`` for the model ``key`` ends with an error."""

    key: str
    client: int
    error: WoolyError


@dataclass(frozen=True)
class HasTurn:
    """``client`` holds the turn ``name``."""

    name: str
    client: int


@dataclass(frozen=True)
class Forgotten:
    """The model ``key`` is no longer committed: the keeper must forget it."""

    key: str


@dataclass(frozen=True)
class Relocated:
    """Blobs of the committed model ``key`` have other locations: the keeper must record them."""

    key: str


@dataclass(frozen=True)
class Released:
    """The segment with this id has no references left: its memory must be released."""

    segment: int


@dataclass(frozen=True)
class Left:
    """The segment with this id leaves its device: the memory there must be released, and the host copy stays."""

    segment: int


Answer = MayPublish | MayRead | Refused | HasTurn
Effect = Answer | Forgotten | Relocated | Released | Left
