"""Check of the environment variables."""

from __future__ import annotations

import os

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.cli.checks.check import Check


def environment() -> Check:
    """Check the values of known variables, and report unknown variables that start with ``WOOLY_``."""
    name = "environment"
    known = {variable.name for variable in envs.REGISTRY}
    given = sorted(variable for variable in os.environ if variable.startswith("WOOLY_"))
    for variable in envs.REGISTRY:
        try:
            variable.get()
        except ConfigError as error:
            return Check(name, "failed", str(error), f"change or unset {variable.name}")
    unknown = [variable for variable in given if variable not in known]
    if unknown:
        advice = f"valid variables: {', '.join(sorted(known))}"
        return Check(name, "warning", f"unknown: {', '.join(unknown)}", advice)
    return Check(name, "ok", f"set: {', '.join(given)}" if given else "no WOOLY_ variable is set")
