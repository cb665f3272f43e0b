"""The model loader: attaches to a model in the store, or loads its checkpoint and publishes it."""
