"""Run a reader from an installation of any version: ``installed_reader.py RUNTIME_DIR KEY SIZES``.

It imports only what every version has: `Session.connect` and `Session.open`. For each line on stdin it writes one JSON
line: digests of the bytes that it has mapped, the store's pid, and the path that its package was imported from.
"""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

from blake3 import blake3

import shared_store
from shared_store.client.session import Session


def main():
    directory, key, sizes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    session = Session.connect(directory, name="reader", autostart=False)
    found = session.open(key, name="model", engine="test", device="cpu", publish=False, timeout_s=30.0)
    attached, fds = found
    numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
    mapped = [
        mmap.mmap(fd, segment.nbytes, prot=mmap.PROT_READ)
        for fd, segment in zip(numbers, attached.segments, strict=True)
    ]
    for _ in sys.stdin:
        bytes_of = [
            memoryview(mapped[place.segment])[place.offset : place.offset + nbytes]
            for place, nbytes in zip(attached.places, sizes, strict=True)
        ]
        answer = {
            "digests": [blake3(data).hexdigest() for data in bytes_of],
            "alive": session.alive,
            "store_pid": session.store_pid,
            "package": str(Path(shared_store.__file__).parent),
            "version": shared_store.__version__,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
