"""The processes that benchmarks start and measure."""
