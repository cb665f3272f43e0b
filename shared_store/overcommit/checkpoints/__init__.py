"""The deep tier: a helper process beside a workload, which takes the workload's processes off their GPU, and back."""
