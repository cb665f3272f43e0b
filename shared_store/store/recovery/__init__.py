"""After a restart: the grace period, restored state, and segments that clients offer."""
