"""Content digests: BLAKE3-256, the only identity that wooly trusts.

A digest is 32 bytes. Algorithm and parameters are those of https://github.com/BLAKE3-team/BLAKE3-specs, unkeyed, so
any BLAKE3 tool gives the same value for the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 32
"""Bytes of a digest."""

_PARALLEL_FROM = 1 << 20  # below about 1 MiB the thread pool costs more than it gains


def digest(data: Buffer) -> bytes:
    """BLAKE3-256 of the bytes, on all cores when there are enough of them."""
    view = memoryview(data).cast("B")
    threads = blake3.AUTO if view.nbytes >= _PARALLEL_FROM else 1
    return blake3(view, max_threads=threads).digest()


def digest_at(address: int, nbytes: int) -> bytes:
    """BLAKE3-256 of ``nbytes`` readable bytes at a host address of this process.

    The caller vouches for the range; nothing is copied.
    """
    import ctypes

    if nbytes == 0:
        return digest(b"")
    return digest((ctypes.c_char * nbytes).from_address(address))
