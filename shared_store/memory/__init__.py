"""Memory that processes can share: one interface, one implementation for each kind of device.

Both sides use a backend: the store creates, exports and seals segments; clients import, reserve, map and unmap.
"""

from shared_store.memory.backend import Access, Backend, Segment, Unknown
from shared_store.memory.fd_segment import FdSegment, export
from shared_store.memory.mapping import Mapping
from shared_store.memory.memfd import MemfdBackend, is_memory_file
from shared_store.memory.registry import backend_for
from shared_store.memory.swap_files import SwapFiles

__all__ = [
    "Access",
    "Backend",
    "FdSegment",
    "Mapping",
    "MemfdBackend",
    "Segment",
    "SwapFiles",
    "Unknown",
    "backend_for",
    "export",
    "is_memory_file",
]
