"""The catalog: a copy of the store's state in Redis or Valkey, for lookups by the rest of a cluster.

The store is authoritative: the catalog may be unreachable, emptied or lost, and is then rewritten completely.
Importing this package imports neither Redis nor Valkey; the catalog's own thread does. ``docs/catalog.md`` describes
the keys.
"""

from shared_store.catalog.catalog import Catalog, CatalogState
from shared_store.catalog.embedded import EmbeddedServer
from shared_store.catalog.schema import BlobDoc, LeaseDoc, ModelDoc, NodeDoc, Snapshot

__all__ = ["BlobDoc", "Catalog", "CatalogState", "EmbeddedServer", "LeaseDoc", "ModelDoc", "NodeDoc", "Snapshot"]
