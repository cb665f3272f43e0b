"""Admission, eviction and compaction: whether an allocation fits, and which memory is freed for it."""
