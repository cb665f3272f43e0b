"""The name under which a keeper starts a store: `python -m shared_store.daemon`. The store is `shared_store.store`."""
