"""Saved models: models of the store in files, how they are written and restored, and the cache of them."""
