"""The store's part of compute by priority: starts the arbiter, tells it of workloads, and keeps what it reports."""
