"""The store: one process a node that allocates segments, decides who publishes, and hands out fds.

It imports neither torch nor CUDA, and is ready in a fraction of a second. All state lives in one event loop; what
takes time (allocating, checking digests, the catalog) happens in threads, so that no client waits for another's work.
"""
