"""Private memory that leaves its device and returns to the same addresses: ranges, and copies of them on the host."""
