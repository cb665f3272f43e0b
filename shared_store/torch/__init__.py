"""The part of the client that deals in torch tensors and modules; the two plugins share it."""
