"""Content digests: BLAKE3-256, the only identity that wooly trusts.

A digest is 32 bytes. Algorithm and parameters are those of https://github.com/BLAKE3-team/BLAKE3-specs, unkeyed, so
any BLAKE3 tool computes the same value for the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 32
"""Bytes of a digest."""

_PARALLEL_FROM = 1 << 20  # below about 1 MiB, starting threads takes longer than they save


def digest(data: Buffer) -> bytes:
    """Return the BLAKE3-256 of the bytes, computed on all cores from 1 MiB on."""
    view = memoryview(data).cast("B")
    threads = blake3.AUTO if view.nbytes >= _PARALLEL_FROM else 1
    return blake3(view, max_threads=threads).digest()


def digest_at(address: int, nbytes: int) -> bytes:
    """Return the BLAKE3-256 of ``nbytes`` bytes at a host address of this process. Nothing is copied.

    The range must be readable: it is not checked, and a fault ends the process.
    """
    import ctypes

    if nbytes == 0:
        return digest(b"")
    return digest((ctypes.c_char * nbytes).from_address(address))
