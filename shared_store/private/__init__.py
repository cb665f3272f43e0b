"""Memory of one process that can leave its device and return at the same addresses, and copies of it meanwhile."""
