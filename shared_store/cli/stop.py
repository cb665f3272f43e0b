"""``wooly stop``."""

import contextlib
import logging
import os
import select
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConnectionLostError, StoreUnavailableError, TimedOutError
from shared_store.cli.options import RuntimeDir, connect
from shared_store.runtime.paths import RuntimePaths

GONE_WITHIN_S: Final = 30.0


def command(runtime_dir: RuntimeDir = None) -> None:
    """Stop the store, and wait until it is gone.

    Engines go on: what they have mapped stays theirs. Exit code 3: there was no store.

    \b
    Examples:
      wooly stop
      wooly stop && wooly serve --detach      with other options
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    directory = (runtime_dir or envs.RUNTIME_DIR.get()).absolute()
    try:
        session = connect(runtime_dir)
    except ConnectionLostError:
        raise  # one was there, and did not greet: that is not "none runs"
    except StoreUnavailableError as error:
        raise StoreUnavailableError(f"no store runs in {directory}: there is nothing to stop") from error
    logging.getLogger("shared_store").setLevel(logging.ERROR)  # that the store ends is no news here
    with session, contextlib.ExitStack() as held:
        pid, keeper = session.store_pid, session.status().keeper
        processes = {}
        for one in (pid, *([keeper.pid] if keeper is not None else [])):
            with contextlib.suppress(ProcessLookupError):
                processes[one] = os.pidfd_open(one)
                held.callback(os.close, processes[one])
        with contextlib.suppress(ConnectionLostError):  # it was quicker to end than to answer
            session.shutdown_store()
        session.close()  # the store may wait for its clients
        for one, process in processes.items():
            if not select.select([process], [], [], GONE_WITHIN_S)[0]:
                raise TimedOutError(
                    f"the store (pid {pid}) was told to end, and pid {one} still runs after {GONE_WITHIN_S:.0f} s; "
                    f"its log may say why: {RuntimePaths(directory).log}"
                )
    if pid not in processes:
        print(f"told the store to end; its pid {pid} is another container's, so its end cannot be seen from here")
    else:
        print(f"stopped the store (pid {pid})")
