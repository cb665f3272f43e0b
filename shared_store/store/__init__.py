"""The store: one process for each runtime directory. It allocates segments, decides, and passes descriptors to clients.

A message goes from a connection through the server and dispatch to one handler (``models``, ``clients``, ``space``,
``recovery``), which reads and changes the state and returns an answer. All state belongs to one event loop. Slow work
(allocation, digests, the catalog) runs in threads; after each wait for it, handlers check the state again.

Imports neither torch nor CUDA.
"""
