"""The state of a store: plain data with rules. No I/O, no event loop, no memory backends, no sockets.

Methods return effects (:mod:`shared_store.store.state.effects`): the work that a change of the state requires of the
process around it, such as releasing a segment or answering a waiting client.
"""
