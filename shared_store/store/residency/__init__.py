"""Which workloads are on their devices: the policy, the accounts, and the swapper that acts on them."""
