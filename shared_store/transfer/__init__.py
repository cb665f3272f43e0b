"""Whole models on the move: checked where they lie, saved to disk, restored from it, and kept in a cache directory.

Clients of the store that need no torch: the command line and engines use the same code, for host memory and for GPUs.
"""
