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
    """Stop the store and its keeper, and wait until both have ended.

    Engines continue with the models that they have mapped, and return them to the next store. Models without readers
    are lost, and must be loaded again. To change only the version, use `wooly upgrade`. Exit code 3: no store is
    running.

    \b
    Examples:
      wooly stop
      wooly stop && wooly serve --detach --max-resident cpu=64GiB
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    directory = (runtime_dir or envs.RUNTIME_DIR.get()).absolute()
    try:
        session = connect(runtime_dir)
    except ConnectionLostError:
        raise  # a store is running and did not greet
    except StoreUnavailableError as error:
        raise StoreUnavailableError(f"no store is running in {directory}; there is nothing to stop") from error
    logging.getLogger("shared_store").setLevel(logging.ERROR)  # the end of the store is expected here
    with session, contextlib.ExitStack() as closing:
        pid, keeper = session.store_pid, session.status().keeper
        processes = {}
        for one in (pid, *([keeper.pid] if keeper is not None else [])):
            with contextlib.suppress(ProcessLookupError):
                processes[one] = os.pidfd_open(one)
                closing.callback(os.close, processes[one])
        with contextlib.suppress(ConnectionLostError):  # the store ended before it answered
            session.shutdown_store()
        session.close()  # the store may wait for its clients to disconnect
        for one, process in processes.items():
            if not select.select([process], [], [], GONE_WITHIN_S)[0]:
                raise TimedOutError(
                    f"asked the store (pid {pid}) to stop, but pid {one} still runs after {GONE_WITHIN_S:.0f} s; "
                    f"see its log: {RuntimePaths(directory).log}"
                )
    if pid not in processes:
        print(
            f"asked the store to stop; its pid {pid} is in another container, so its end cannot be observed from here"
        )
    else:
        print(f"stopped the store (pid {pid})")
