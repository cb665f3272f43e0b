"""Whether resident blobs are what their digests say, and what becomes of those that are not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from shared_store.base.errors import DigestMismatchError, ModelNotFoundError
from shared_store.base.status import ModelStatus
from shared_store.client.session import Session
from shared_store.memory import backend_for
from shared_store.transfer.copier import Copier, Progress, copier_for, unheard
from shared_store.transfer.reading import Holding, reading


class Verified(msgspec.Struct, frozen=True):
    """What was found of one model.

    ``blobs`` and ``bytes``: digested for it; those of models before it count there. ``mismatched``: digests (hex) of
    the blobs that have other bytes. ``gone``: it left the store before its turn came.
    """

    key: str
    name: str
    device: str
    blobs: int
    bytes: int
    seconds: float
    result: Literal["ok", "mismatch", "gone"]
    mismatched: tuple[str, ...] = ()


def mismatched(holding: Holding, copier: Copier, progress: Progress = unheard) -> tuple[bytes, ...]:
    """Digests of a model's blobs whose bytes are others."""
    found = copier.digests(list(holding.spans.values()), progress)
    return tuple(digest for digest, actual in zip(holding.spans, found, strict=True) if digest != actual)


def quarantine(session: Session, key: str, wrong: Sequence[bytes]) -> None:
    """Have the store take blobs of a model out of service; somebody else may have been first."""
    with contextlib.suppress(ModelNotFoundError):
        session.quarantine(key, wrong)


def check(session: Session, holding: Holding, copier: Copier) -> None:
    """Digest all of a model; have the store take out of service what is wrong.

    Raises:
        DigestMismatchError: something is.
    """
    wrong = mismatched(holding, copier)
    if wrong:
        quarantine(session, holding.manifest.key, wrong)
        raise DigestMismatchError(
            f"{len(wrong)} blobs of {holding.manifest.name} are not what their digests say; the model is out of "
            "service, and the next engine that needs it loads it again"
        )


def verify(session: Session, models: Sequence[ModelStatus], progress: Progress = unheard) -> Iterator[Verified]:
    """Digest the blobs of committed models, each distinct blob of a device once, and quarantine what is wrong.

    A model is held only while it is looked at.

    Raises:
        UnknownDeviceError: a model's device is not visible to this process.
    """
    for device in dict.fromkeys(model.device for model in models):
        sound: set[bytes] = set()
        backend = backend_for(device)
        with copier_for(backend) as copier:
            for model in (model for model in models if model.device == device):
                began = time.perf_counter()
                wrong: tuple[bytes, ...] = ()
                try:
                    with reading(session, model, backend) as whole:
                        new = {digest: span for digest, span in whole.spans.items() if digest not in sound}
                        holding = Holding(whole.manifest, new)
                        wrong = mismatched(holding, copier, progress)
                except ModelNotFoundError:
                    yield Verified(model.key, model.name, device, 0, 0, 0.0, "gone")
                    continue
                sound |= new.keys() - set(wrong)
                seconds = time.perf_counter() - began
                if wrong:
                    quarantine(session, model.key, wrong)
                yield Verified(
                    model.key,
                    model.name,
                    device,
                    len(new),
                    sum(nbytes for _, nbytes in new.values()),
                    seconds,
                    "mismatch" if wrong else "ok",
                    tuple(digest.hex() for digest in wrong),
                )
