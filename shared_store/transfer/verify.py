"""Verification: digest resident blobs again, and quarantine those that changed."""

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
from shared_store.transfer.copier import Copier, Progress, copier_for, ignore_progress
from shared_store.transfer.digest_check import mismatches
from shared_store.transfer.resident import ResidentModel, attach


class Verified(msgspec.Struct, frozen=True):
    """The result for one model.

    Attributes:
        key: the weight key.
        name: the model's name.
        device: the model's device.
        blobs: blobs digested for this model; blobs shared with an earlier model count there.
        bytes: bytes of those blobs.
        seconds: time that digesting took.
        result: ``gone`` when the model left the store before it was checked.
        mismatched: digests (hexadecimal) of the blobs whose bytes differ.
    """

    key: str
    name: str
    device: str
    blobs: int
    bytes: int
    seconds: float
    result: Literal["ok", "mismatch", "gone"]
    mismatched: tuple[str, ...] = ()


def mismatched(model: ResidentModel, copier: Copier, progress: Progress = ignore_progress) -> tuple[bytes, ...]:
    """Return the digests of a model's blobs whose bytes differ."""
    return tuple(mismatches(list(model.spans.items()), copier, progress))


def quarantine(session: Session, key: str, wrong: Sequence[bytes]) -> None:
    """Ask the store to quarantine blobs of a model. Does nothing if the store withdrew the model already."""
    with contextlib.suppress(ModelNotFoundError):
        session.quarantine(key, wrong)


def check(session: Session, model: ResidentModel, copier: Copier) -> None:
    """Digest all blobs of a mapped model, and quarantine those that differ.

    Raises:
        DigestMismatchError: at least one blob differs.
    """
    wrong = mismatched(model, copier)
    if wrong:
        quarantine(session, model.manifest.key, wrong)
        raise DigestMismatchError(
            f"{len(wrong)} blobs of {model.manifest.name} do not match their digests; the model is withdrawn, and the "
            "next engine that needs it loads it again"
        )


def verify(session: Session, models: Sequence[ModelStatus], progress: Progress = ignore_progress) -> Iterator[Verified]:
    """Digest the blobs of committed models, each distinct blob of a device once, and quarantine those that differ.

    This process is a reader of a model only while it digests it.

    Args:
        session: the connection.
        models: committed models.
        progress: called with bytes digested.

    Raises:
        UnknownDeviceError: a model's device is not visible to this process.
    """
    for device in dict.fromkeys(model.device for model in models):
        sound: set[bytes] = set()
        backend = backend_for(device)
        with copier_for(backend) as copier:
            for model in (model for model in models if model.device == device):
                began = time.perf_counter()
                try:
                    with attach(session, model, backend) as resident:
                        new = {digest: span for digest, span in resident.spans.items() if digest not in sound}
                        wrong = mismatched(ResidentModel(resident.manifest, new), copier, progress)
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
