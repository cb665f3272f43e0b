"""``wooly version``."""

import shared_store


def command() -> None:
    """Print the version."""
    print(f"wooly {shared_store.__version__}")
