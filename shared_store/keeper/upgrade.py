"""Replace the keeper by another installation's, in the same process (``exec``), with all fds and the state.

Relies on: fds that are inheritable keep their numbers over ``exec``. The module name ``shared_store.keeper`` and its
arguments are an interface between versions.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from shared_store.protocol import keeper_messages
from shared_store.protocol.handover import Handover, leave

log = logging.getLogger(__name__)


def become(installation: keeper_messages.Upgrade, handover: Handover, directory: Path) -> OSError:
    """Execute the installation's keeper. Does not return unless that fails; then everything is as before."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LISTEN_"))}
    python = {name: value for name, value in installation.environment.items() if name.startswith("PYTHON")}
    with leave(handover) as memfd:
        command = [installation.python, "-m", "shared_store.keeper", str(directory), "", "", str(memfd.fileno())]
        log.info("upgrading the keeper to %s", installation.python)
        for fd in (memfd.fileno(), *handover.fds):
            os.set_inheritable(fd, True)
        try:
            os.execve(installation.python, command, {**inherited, **python})  # noqa: S606 - no shell is the point
        except OSError as error:
            for fd in handover.fds:
                os.set_inheritable(fd, False)
            return error
