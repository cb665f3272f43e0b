"""Check of the environment variables and configuration files."""

from __future__ import annotations

import os

from shared_store.base import config_file, envs
from shared_store.base.errors import ConfigError
from shared_store.cli.checks.check import Check


def environment() -> Check:
    """Check the values of known variables, and report unknown ones that start with ``WOOLY_``, also in files."""
    name = "environment"
    known = {name for variable in envs.REGISTRY for name in variable.names}
    given = sorted(variable for variable in os.environ if variable.startswith("WOOLY_"))
    for variable in envs.REGISTRY:
        try:
            variable.get()
        except ConfigError as error:
            return Check(name, "failed", str(error), f"change or unset {variable.name}, there or in the environment")
    files = dict(config_file.files())
    unknown = [variable for variable in given if variable not in known]
    unknown += [
        f"{key} in {path}"
        for path, values in files.items()
        for key in sorted(values)
        if key.startswith("WOOLY_") and key not in known
    ]
    if unknown:
        advice = f"valid variables: {', '.join(sorted(known))}"
        return Check(name, "warning", f"unknown: {', '.join(unknown)}", advice)
    found = f"set: {', '.join(given)}" if given else "no WOOLY_ variable is set"
    return Check(name, "ok", "; ".join([found, *(f"read: {path}" for path in files)]))
