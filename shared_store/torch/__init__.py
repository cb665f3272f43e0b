"""The client for torch: publish a loaded model, bind another process's tensors. Both plugins build on it."""
