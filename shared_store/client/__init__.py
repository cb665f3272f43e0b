"""The client: a session with the store (started if needed), checkpoint digests, and compaction of device memory.

Needs no torch; :mod:`shared_store.torch` is the part that handles tensors.
"""
