"""The background saver, ``python -m shared_store.disk.saver KEY``: saves a resident model in the cache directory.

The engine that published the model starts it detached, so it goes on when the engine ends, and the engine never waits
for it. Savers wait for each other: one model at a time is written on a node. It is configured by the environment and
logs to ``saver.log`` in the cache directory.

On a GPU it takes a turn with the engines that start there: it needs a CUDA context, and an engine that measures free
memory at the same time would count that context as its own memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from shared_store.base import envs
from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.disk.cache import Cache, available, configured
from shared_store.disk.save import save_resident
from shared_store.runtime.spawn import detach
from shared_store.transfer.resident import committed

log = logging.getLogger(__name__)

LOG: Final = "saver.log"
_TURN_TIMEOUT_S: Final = 1800.0


def save_in_background(key: str, runtime_dir: Path | None = None) -> None:
    """Start a saver for a published model, if a cache is configured that does not have it yet. Returns at once.

    A failure to start is logged.

    Args:
        key: the model's weight key.
        runtime_dir: the store's runtime directory; by default ``WOOLY_RUNTIME_DIR``.
    """
    cache = available()
    if cache is None or cache.find(key) is not None:
        return
    command = [sys.executable, "-m", "shared_store.disk.saver", key]
    environment = {**os.environ, envs.RUNTIME_DIR.name: os.fspath(runtime_dir or envs.RUNTIME_DIR.get())}
    try:
        detach(command, cache.directory / LOG, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("wooly: cannot start the saver; the model is not cached: %s", error)


def run(cache: Cache, key: str) -> bool:
    """Save a model in the cache, after other savers. Returns False if the cache has it already.

    Raises:
        ModelNotFoundError: the store does not have the model.
        WoolyError: as connecting, :meth:`Cache.evict` and :func:`save_resident` raise.
    """
    with Session.connect(name="wooly cache", autostart=False) as session, cache.locked():
        if cache.find(key) is not None:
            return False
        model = committed(session.status().models, key)
        on_cpu = model.device == "cpu"
        with contextlib.nullcontext() if on_cpu else session.turn(f"start:{model.device}", _TURN_TIMEOUT_S):
            for evicted in cache.evict(model.bytes):
                log.info("evicted %s from the cache", evicted)
            saved = save_resident(session, model, cache.path(key))
        log.info("saved %s in %.1f s: %d bytes, key %s", saved.name, saved.seconds, saved.bytes, key)
        return True


def main() -> int:
    """Save the model whose key is the argument. Returns the exit code, which is the error's."""
    logging.basicConfig(level=envs.LOG_LEVEL.get(), format="%(asctime)s %(levelname)s %(message)s")
    os.nice(10)  # engines have priority
    try:
        cache = configured()
        if cache is not None:
            run(cache, sys.argv[1])
    except WoolyError as error:
        log.error("%s was not saved: %s [%s]", sys.argv[1], error, error.code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
