"""The activity page: one page of shared memory in which a client says whether it works, without a message.

The store makes a page for each client that asks for one, and reads it when it takes a status. :mod:`layout` has its
fields, which both sides know; :mod:`page` is the store's side, :mod:`writer` the client's.
"""
