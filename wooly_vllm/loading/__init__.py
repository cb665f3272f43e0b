"""The model loader: from the checkpoint or the store to a bound model."""
