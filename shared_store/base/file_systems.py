"""File systems on which a change of a file's bytes is sure to show in its device, inode, size and times.

They are those whose kernel, or server, sets the ctime at every change, by a clock that programs do not set. Others
make up what their storage does not have: an object store behind FUSE may give every file a constant ctime, or the mtime
that an uploader chose, and an inode that is a number of the name. Images such as squashfs have the times that their
builder wrote, and the inodes of one image recur in the next.

Unknown file systems are not trusted. Users name directories that they trust (``WOOLY_TRUSTED_DIRECTORIES``).

Relies on 64-bit Linux: ``statfs(2)``, whose structure begins with the type as a ``long``. The numbers are those of
``include/uapi/linux/magic.h``; XFS, ZFS and bcachefs define theirs beside their code.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared_store.base import envs

_STATFS_BYTES: Final = 256  # more than the structure has on any architecture
_OVERLAY: Final = 0x794C7630
_NFS: Final = 0x6969
_CEPH: Final = 0x00C36400

_STAMPED_BY_KERNEL: Final = {
    0xEF53: "ext4",  # ext2 and ext3 too
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    _OVERLAY: "overlay",
    # By a server, or by clients that agree on it.
    _NFS: "nfs",
    _CEPH: "ceph",
}

_KNOWN_OTHERS: Final = {
    0x65735546: "FUSE",
    0x01021997: "9p",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x9660: "iso9660",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
}


def why_unrecognized(path: Path) -> str:
    """Return why a file's identity may stay equal although its bytes change; empty if it cannot.

    Raises:
        OSError: the file cannot be examined.
    """
    kind = type_of(path)
    name = _STAMPED_BY_KERNEL.get(kind)
    if name is None:
        reason = f"the times of files on {_KNOWN_OTHERS.get(kind, f'a file system of type {kind:#x}')} may be made up"
    elif kind == _OVERLAY and _may_be_of_an_image(path.stat()):
        reason = "its times may be those of an image"
    else:
        return ""
    resolved = path.resolve()
    return "" if any(resolved.is_relative_to(trusted) for trusted in envs.TRUSTED_DIRECTORIES.get()) else reason


def has_server(path: Path) -> bool:
    """Return True on a network file system that asks its server for a file's current times when it is opened.

    Raises:
        OSError: the file cannot be examined.
    """
    return type_of(path) in {_NFS, _CEPH}


def type_of(path: Path) -> int:
    """Return the number of a file's file system (``f_type``). Links are followed."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_char * _STATFS_BYTES)()
    statfs: Callable[[bytes, object], int] = libc.statfs
    if statfs(os.fsencode(path), buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _may_be_of_an_image(found: os.stat_result) -> bool:
    """Return True if a file on an overlay may come from a read-only image, which has one time for each file.

    The layers below an overlay must not change while it is mounted, but another overlay of the same device number can
    have other ones. A directory that an image was unpacked to has the ctime of the unpacking, which follows the mtime.
    """
    booted_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return found.st_ctime_ns == found.st_mtime_ns and found.st_ctime_ns < booted_ns
