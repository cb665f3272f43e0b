"""A process that maps memory of a device in phases, and writes to a journal when each begins and ends.

Arguments: runtime directory, device, journal, number of phases; 0 is one phase that lasts until a line comes.
"""

import os
import sys
import time
from pathlib import Path

from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Access, Mapping, backend_for
from shared_store.memory.fake import FakeBackend

LONGEST_S = 60
IN_TESTS = ("GPU-test", "GPU-other")
"""Devices that are host memory, with work in flight."""


def tell(word):
    os.write(sys.stdout.fileno(), f"{word}\n".encode())


def main(directory, device, journal, phases):
    backend = FakeBackend(device) if device in IN_TESTS else backend_for(device)
    backend.asynchronous = True
    log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Session.connect(Path(directory), autostart=False) as session:
        tell("connected")
        sys.stdin.readline()
        for _ in range(int(phases) or 1):
            with mapping_phase(session, backend, LONGEST_S):
                os.write(log, b"begin %d\n" % os.getpid())
                with Mapping(backend, backend.create(backend.granularity)) as mapping:
                    mapping.map(Access.WRITE)
                    time.sleep(0.002)  # longer than the switch to another process
                if phases == "0":
                    tell("inside")
                    sys.stdin.readline()
                os.write(log, b"end %d\n" % os.getpid())


if __name__ == "__main__":
    main(*sys.argv[1:])
