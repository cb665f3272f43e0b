"""Starting a detached store, and its keeper, with given options."""

from __future__ import annotations

import dataclasses

from shared_store.base.errors import StoreRunningError
from shared_store.runtime import spawn
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.paths import prepare


def start_detached(options: ServeOptions, timeout_s: float = 10.0) -> int:
    """Start a store that outlives this process; returns its keeper's pid once clients can connect.

    Raises:
        StoreRunningError: the runtime directory has a store.
        StoreUnavailableError: it did not come up; the message has the end of its log.
    """
    paths = prepare(options.runtime_dir, mode=options.directory_mode)
    running = StoreRunningError(f"a store runs already in {paths.directory}; `wooly status` shows it")
    if spawn.answers(paths):
        raise running
    text = dataclasses.replace(options, runtime_dir=paths.directory).to_json()
    pid = spawn.start(paths.directory, text, mode=options.directory_mode, timeout_s=timeout_s)
    if not pid:
        raise running
    return pid
