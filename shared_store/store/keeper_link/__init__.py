"""The connection to the keeper, which retains descriptors and metadata for the next store."""
