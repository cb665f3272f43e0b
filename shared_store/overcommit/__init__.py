"""The client's side of overcommit: one agent for each workload, which leaves its devices and returns on demand."""
