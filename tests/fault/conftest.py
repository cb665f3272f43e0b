"""Real stores and clients."""

from support.fixtures import actor, directory, start_store, store

__all__ = ["actor", "directory", "start_store", "store"]
