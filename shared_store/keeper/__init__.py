"""The keeper: the store's parent process. It retains the state that must outlive a store, and restarts the store.

The state is the listening socket, the lock of the runtime directory, an fd of each segment of a committed model, and
the models' metadata with a journal of it. The keeper imports little and decides little, so that it does not fail where
a store can: no torch, no CUDA, no Redis, no event loop.
"""
