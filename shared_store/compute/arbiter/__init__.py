"""The arbiter's process, ``python -m shared_store.compute.arbiter FD``: a child of the store, which it ends with."""
