"""A process of an installed version that opens, leaves and takes turns without a pause, until its input ends.

Prints the rounds that it made, and the errors other than lost connections. Imports wooly from its working path only, so
that any version runs it.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from shared_store.base.errors import ConnectionLostError, WoolyError
from shared_store.client.session import Session


def one_round(session, key):
    """Attach, leave, take a turn, and ask for the status."""
    found = session.open(key, name="", engine="test", device="cpu", publish=False, timeout_s=30.0)
    found[1].close()
    session.leave(key)
    with session.turn("load", 30.0):
        pass
    session.status()


def main():
    directory, key = Path(sys.argv[1]), sys.argv[2]
    end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
    rounds, lost, errors, stores = 0, 0, [], set()
    with Session.connect(directory, name="load", autostart=False) as session:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while not end.is_set():
            try:
                one_round(session, key)
                rounds += 1
                stores.add(session.store_pid)
            except ConnectionLostError:
                lost += 1
            except WoolyError as error:
                errors.append(f"{error.code}: {error}")
    sys.stdout.write(json.dumps({"rounds": rounds, "lost": lost, "errors": errors, "stores": sorted(stores)}) + "\n")


main()
