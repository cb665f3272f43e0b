"""``python -m shared_store.disk.saver KEY``: saves a model of the store in the cache directory, in the background.

Started by the engine that published the model, and nobody's child: it goes on when the engine dies, and an engine never
waits for it. Several wait for each other, so one model at a time is written on a node. Its settings are the
environment's; what it says goes to ``saver.log`` in the cache directory.

On a GPU it takes its turn among the engines that start there: it needs a CUDA context, and an engine that looks at free
memory meanwhile would count that as its own.
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
from shared_store.disk.cache import Cache, configured
from shared_store.disk.save import save_resident
from shared_store.runtime.spawn import detach
from shared_store.transfer.reading import committed

log = logging.getLogger(__name__)

LOG: Final = "saver.log"
_PATIENCE_S: Final = 1800.0


def save_later(cache: Cache, key: str, runtime_dir: Path | None = None) -> None:
    """Have a model saved by a process of its own, unless the cache has it. Returns at once; failures are logged."""
    if cache.find(key) is not None:
        return
    command = [sys.executable, "-m", "shared_store.disk.saver", key]
    environment = {**os.environ, envs.RUNTIME_DIR.name: os.fspath(runtime_dir or envs.RUNTIME_DIR.get())}
    try:
        detach(command, cache.directory / LOG, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("wooly: the model will not be in the cache: %s", error)


def run(cache: Cache, key: str) -> bool:
    """Save a model when its turn comes; whether it had to be. Raises what saving raises."""
    with Session.connect(name="wooly cache", autostart=False) as session, cache.turn():
        if cache.find(key) is not None:
            return False
        model = committed(session.status().models, key)
        with contextlib.nullcontext() if model.device == "cpu" else session.turn(f"start:{model.device}", _PATIENCE_S):
            for left in cache.make_room(model.bytes):
                log.info("%s left the cache to make room", left)
            saved = save_resident(session, model, cache.entry(key))
        log.info("saved %s in %.1f s: %d bytes, key %s", saved.name, saved.seconds, saved.bytes, key)
        return True


def main() -> int:
    """Save the model whose key is the argument; the exit code is the error's."""
    logging.basicConfig(level=envs.LOG_LEVEL.get(), format="%(asctime)s %(levelname)s %(message)s")
    os.nice(10)  # whoever computes goes first
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
