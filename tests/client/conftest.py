"""Sessions of a real store."""

from support.session_fixtures import directory, sessions, start_store, store

__all__ = ["directory", "sessions", "start_store", "store"]
