"""The client: connects to the store (and starts one), maps models, publishes them, and binds them to modules.

``session`` and ``mapping`` need no torch; what deals in tensors does.
"""
