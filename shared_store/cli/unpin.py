"""``wooly unpin``."""

from shared_store.cli.options import Key, RuntimeDir, connect


def command(key: Key, runtime_dir: RuntimeDir = None) -> None:
    """Unpin a model, so that it can be evicted.

    \b
    Example:
      wooly unpin 3f9a
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    with connect(runtime_dir) as session:
        print(f"unpinned {session.pin(key, pinned=False)}")
