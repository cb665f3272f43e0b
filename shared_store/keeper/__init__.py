"""The keeper: the store's parent, which holds what a store must not take with it when it dies.

That is the listening socket, the lock of the runtime directory, an fd of every segment of a committed model, and a
journal of what they are. It starts the store, and starts it again when it dies. It imports little and does little, so
that nothing in it can fail that a store can do without: no torch, no CUDA, no Redis, no event loop.
"""
