"""A store whose memory stays writable once it is published, as a GPU's does: for tests in which bytes change."""

import sys

from shared_store.memory import MemfdBackend


def leave_open(_backend, _segment):
    """What sealing is on a GPU."""


MemfdBackend.seal = leave_open

from shared_store.daemon.__main__ import main  # noqa: E402 - the store is to find the class so

sys.exit(main())
