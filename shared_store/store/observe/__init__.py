"""What others see of a store: snapshots, metrics, latencies, the catalog."""
