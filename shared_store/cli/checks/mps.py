"""Check of what a cap under MPS needs: a daemon."""

from __future__ import annotations

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.cli.checks.check import Check
from shared_store.compute.mps import DANGER, check_daemon


def mps() -> Check:
    """Look for an MPS daemon, if a cap is asked for. Says what the danger is."""
    name = "mps"
    try:
        percent = envs.MPS_PERCENT.get()
        if percent is None:
            return Check(name, "ok", "not used by wooly (WOOLY_MPS_PERCENT is not set)")
        check_daemon()
    except ConfigError as error:
        return Check(name, "failed", str(error), "without a daemon, workloads with this variable do not start")
    return Check(name, "warning", f"workloads may use {percent}% of the threads of a GPU", f"mind that {DANGER}")
