"""``wooly doctor``."""

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir


def command(*, as_json: Json = False, runtime_dir: RuntimeDir = None) -> None:
    """Check this machine, and say what to do.

    Looks only: starts and creates nothing that stays. Exit code 1: a check failed; warnings do not count.

    \b
    Examples:
      wooly doctor
      wooly doctor --json | jq '.checks[] | select(.result == "failed")'
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
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
