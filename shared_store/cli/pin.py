"""``wooly pin``."""

from shared_store.cli.options import Key, RuntimeDir, connect


def command(key: Key, runtime_dir: RuntimeDir = None) -> None:
    """Pin a model: never evict it.

    When memory is needed, the store evicts models that no process reads, least recently used first. A pinned model
    remains until `wooly unpin` or `wooly rm`. A model that is being published can be pinned, too.

    \b
    Example:
      wooly pin 3f9a
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    with connect(runtime_dir) as session:
        print(f"pinned {session.pin(key, pinned=True)}")
