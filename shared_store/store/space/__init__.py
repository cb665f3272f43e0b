"""Admission, eviction and compaction: which allocation fits, what is evicted for it, what is packed."""
