"""The exact count after a soak: a store without clients must have nothing that it should not have."""

from __future__ import annotations

from benchmarks.harness.device import Device
from benchmarks.harness.processes import wait_until
from benchmarks.harness.published import open_model, wrong_blobs
from benchmarks.harness.store import usage, wait_for_status
from benchmarks.soak.worker import LEASES
from shared_store.base.errors import TimedOutError
from shared_store.client.session import Session

LEASE_TIMEOUT_S = 1.0


class LeftoverError(Exception):
    """The store has something that it should not have, or lost something."""


def check(session: Session, fds: int, *, patience_s: float = 30.0) -> dict[str, int]:
    """Count everything, then remove all models.

    Args:
        session: The only client.
        fds: Open descriptors of the store before the soak.
        patience_s: Seconds in which dead clients' connections must end and descriptors be closed.

    Returns:
        The models, segments and resident bytes that were left by committed models.

    Raises:
        LeftoverError: A count is wrong.
    """
    try:
        return _check(session, fds, patience_s)
    except (TimeoutError, TimedOutError) as error:
        raise LeftoverError(str(error)) from error


def _check(session: Session, fds: int, patience_s: float) -> dict[str, int]:
    status = wait_for_status(
        session, lambda status: len(status.clients) == 1, "the dead clients' connections to end", patience_s
    )
    busy = [model for model in status.models if model.readers or model.state != "committed"]
    if busy:
        raise LeftoverError(f"models have readers or a publisher, but no client is connected: {busy}")
    if status.totals.mapped_bytes:
        raise LeftoverError(f"{status.totals.mapped_bytes} bytes count as mapped, but no client is connected")
    (cpu,) = status.devices
    found = usage(session.store_pid)
    if (found.segments, found.segment_bytes) != (cpu.segments, cpu.resident_bytes):
        raise LeftoverError(f"the process has {found}, but its status is {cpu}")
    for model in status.models:
        verify(session, model.key)
    figures = {"models_left": len(status.models), "segments_left": cpu.segments, "resident_left": cpu.resident_bytes}
    for model in status.models:
        session.remove(model.key)
    (cpu,) = session.status().devices
    if (cpu.segments, cpu.resident_bytes) != (0, 0):
        raise LeftoverError(f"the store has no models, but {cpu}")
    wait_until(lambda: usage(session.store_pid).fds <= fds, f"the store to have at most {fds} descriptors", patience_s)
    for number in range(LEASES):
        with session.turn(f"lease-{number}", LEASE_TIMEOUT_S):  # times out if a dead client still has the turn
            pass
    return figures


def wait_for_keeper(session: Session, fds: int, *, patience_s: float = 30.0) -> None:
    """Wait until the keeper of a store without models has no segments, and at most ``fds`` descriptors.

    Raises:
        LeftoverError: it has more.
    """
    keeper = session.status().keeper
    if keeper is None:
        raise LeftoverError("the store has no keeper")

    def released() -> bool:
        found = usage(keeper.pid)
        return found.segments == 0 and found.fds <= fds

    try:
        wait_until(released, "the keeper to release what the store has not", patience_s)
    except TimeoutError as error:
        raise LeftoverError(f"{error}: it has {usage(keeper.pid)}, and had {fds} descriptors") from error


def verify(session: Session, model: str) -> None:
    """Verify all bytes of a model. Raises :class:`LeftoverError`."""
    found = open_model(session, model)
    if found is None:
        raise LeftoverError(f"{model} is committed, but was granted for publishing")
    attached, fds = found
    if wrong_blobs(Device(), attached, fds):
        raise LeftoverError(f"{model} has wrong bytes")
    session.leave(model)
