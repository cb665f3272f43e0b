"""GPU memory: segments, copies and digests. Imported only where a GPU is used."""
