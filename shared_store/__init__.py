"""wooly's node-local store of immutable tensors: one copy of a model's weights for every process on the node.

This package is the store itself, its clients, and the ``wooly`` command. Nothing is imported here, because engines,
the store and the command line each need another part, and the store must start without torch.
"""

__version__ = "0.1.0"
