"""``wooly rm``."""

from shared_store.cli.options import Key, RuntimeDir, connect


def command(key: Key, runtime_dir: RuntimeDir = None) -> None:
    """Remove an idle model from the store, pinned or not.

    Its memory is freed, except for tensors that other models share. Exit code 10: the model is in use. `wooly status`
    shows its readers.

    \b
    Example:
      wooly rm 3f9a
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    with connect(runtime_dir) as session:
        print(f"removed {session.remove(key)}")
