"""The name under which a keeper of any version starts a store: ``python -m shared_store.daemon``.

The store itself is :mod:`shared_store.store`. A running keeper restarts its store after the installation was replaced,
so this name and its arguments do not change.
"""
