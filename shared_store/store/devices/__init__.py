"""Devices: memory backends, the memory of allocated segments, and digests of what is in it."""
