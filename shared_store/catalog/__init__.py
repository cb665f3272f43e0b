"""What a node's store holds, mirrored into Redis or Valkey for the rest of a cluster to look up.

The store is authoritative: the catalog may be away, be emptied or be lost, and is written whole again. Importing this
package imports neither Redis nor Valkey; the catalog's own thread does. ``docs/catalog.md`` describes the keys.
"""

from shared_store.catalog.catalog import Catalog, CatalogState
from shared_store.catalog.embedded import EmbeddedServer
from shared_store.catalog.schema import BlobDoc, LeaseDoc, ModelDoc, NodeDoc, Snapshot

__all__ = ["BlobDoc", "Catalog", "CatalogState", "EmbeddedServer", "LeaseDoc", "ModelDoc", "NodeDoc", "Snapshot"]
