"""Checks of the runtime directory and of the running store."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import shared_store
from shared_store.base import envs
from shared_store.base.errors import ConfigError, StoreUnavailableError, WoolyError
from shared_store.cli.checks.check import Check

if TYPE_CHECKING:
    from pathlib import Path


def runtime_directory(directory: Path) -> Check:
    """Check whether a store can use the directory, or create it."""
    from shared_store.runtime.paths import SHARED_MODES, RuntimePaths, check_socket_path, prepare

    name, directory = "runtime directory", directory.absolute()
    advice = "set WOOLY_RUNTIME_DIR to a directory of this user"
    try:
        if directory.exists() or directory.is_symlink():
            mode = stat.S_IMODE(directory.lstat().st_mode)
            shared = mode in SHARED_MODES
            prepare(directory, mode=mode if shared else 0o700)
            return Check(name, "ok", f"{directory}, {'open to others' if shared else 'closed to others'}")
        check_socket_path(RuntimePaths(directory).socket)
    except WoolyError as error:
        return Check(name, "failed", str(error), advice)
    parent = next(parent for parent in directory.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        return Check(name, "failed", f"{directory} cannot be created in {parent}", advice)
    return Check(name, "ok", f"{directory}, not created yet")


def store(directory: Path) -> Check:
    """Check whether a store of this version answers."""
    from shared_store.client.session import Session

    try:
        with Session.connect(directory, name="wooly doctor", autostart=False, timeout_s=5.0, kind="cli") as session:
            status = session.status()
    except StoreUnavailableError:
        return _no_store(directory)
    except WoolyError as error:
        advice = f"see {directory / 'store.log'}, then restart the store: `wooly stop`"
        return Check("store", "failed", f"{error} [{error.code}]", advice)
    running = status.store
    found = f"{running.state}, pid {running.pid}, version {running.version}"
    if running.version != shared_store.__version__:
        return Check("store", "warning", f"{found}; this command is {shared_store.__version__}", "run `wooly upgrade`")
    if running.state != "ok":
        return Check("store", "warning", f"{found}: {', '.join(running.reasons)}", f"see {directory / 'store.log'}")
    return Check("store", "ok", found)


def _no_store(directory: Path) -> Check:
    found = f"not running in {directory}"
    try:
        autostart = envs.AUTOSTART.get()
    except ConfigError:
        return Check("store", "ok", found)  # the check of the environment reports the reason
    if autostart:
        return Check("store", "ok", f"{found}; the first client starts it")
    return Check("store", "warning", f"{found}, and WOOLY_AUTOSTART=0", "start it: `wooly serve --detach`")
