"""Checkpoints that only benchmarks use; the others are in ``tests/support/models``."""
