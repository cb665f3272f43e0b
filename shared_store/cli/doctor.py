"""``wooly doctor``."""

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir


def command(*, as_json: Json = False, runtime_dir: RuntimeDir = None) -> None:
    """Check this machine for problems, and print a solution for each.

    Checks versions, environment variables, GPUs, memory, limits, the catalog and the store. Changes nothing. Exit code
    1: a check failed; a warning does not count.

    \b
    Examples:
      wooly doctor
      wooly doctor --json | jq '.checks[] | select(.result == "failed")'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    from shared_store.base import envs
    from shared_store.cli import checks

    done = checks.run_all(lambda: runtime_dir or envs.RUNTIME_DIR.get())
    failed = any(check.result == "failed" for check in done)
    if as_json:
        render.print_json({"ok": not failed, "checks": done})
    else:
        rows: list[tuple[str, str, str]] = []
        for check in done:
            rows.append((check.result, check.name, check.found))
            if check.advice:
                rows.append(("", "", f"-> {check.advice}"))
        render.console().print(render.table(("RESULT", "CHECK", "FOUND"), rows))
    if failed:
        raise typer.Exit(1)
