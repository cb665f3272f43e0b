"""The workload of a transformers process: its models leave their devices when others need the memory, and return."""
