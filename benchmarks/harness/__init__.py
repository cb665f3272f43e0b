"""Processes, stores, GPUs, and result files: the parts that all benchmarks share."""
