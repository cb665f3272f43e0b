"""Serve a directory through FUSE with file identities that never change: ``fuse_main.py BACKING MOUNTPOINT``.

It speaks the kernel's protocol on /dev/fuse and needs no library. As object stores behind FUSE may do, it makes up what
they do not store: the inode is a number of the name, and all times are one constant. Files are read only, and are
opened without the kernel's cached pages, so that a reader gets the bytes of now. It prints a line once mounted, and
unmounts and ends when its stdin ends.

Protocol: ``include/uapi/linux/fuse.h``, version 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
import threading
from pathlib import Path

MADE_UP_S = 1_600_000_000
"""Every time of every file, in seconds since the epoch."""

LOOKUP, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, OPENDIR, RELEASEDIR = 1, 3, 14, 15, 17, 18, 25, 26, 27, 29
WITHOUT_REPLY = {2, 36, 42}  # forget, interrupt, forget several
ROOT_ID = 1
LARGEST = 1 << 17
MNT_DETACH = 2

libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """Answers requests about one flat directory."""

    def __init__(self, backing):
        self._backing = backing
        self._names = {}

    def attributes(self, node):
        """Pack `struct fuse_attr`."""
        size, mode = 0, stat.S_IFDIR | 0o755
        if node != ROOT_ID:
            size, mode = (self._backing / self._names[node]).stat().st_size, stat.S_IFREG | 0o644
        times = (MADE_UP_S,) * 3
        return struct.pack("<6Q10I", node, size, size // 512, *times, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def answer(self, opcode, node, body):
        """Return the body of a reply. Raises `OSError` for a reply with an error."""
        if opcode == INIT:
            return struct.pack("<4I2H2I2H9I", 7, 31, 0, 0, 16, 12, 4096, 1, 32, 0, *(0,) * 9)[:64]
        if opcode == LOOKUP:
            name = body.rstrip(b"\0").decode()
            if not (self._backing / name).is_file():
                raise OSError(errno.ENOENT, name)
            found = 2 + sum(name.encode()) * 256 + len(name)
            self._names[found] = name
            return struct.pack("<4Q2I", found, 0, 0, 0, 0, 0) + self.attributes(found)
        if opcode == GETATTR:
            return struct.pack("<Q2I", 0, 0, 0) + self.attributes(node)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<Q2I", 0, 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("<2QI", body)
            with (self._backing / self._names[node]).open("rb") as file:
                return os.pread(file.fileno(), size, offset)
        if opcode == STATFS:
            return struct.pack("<5Q4I6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *(0,) * 6)
        if opcode in (RELEASE, RELEASEDIR, FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not served")


def serve(device, server):
    """Answer until the file system is unmounted."""
    while True:
        try:
            request = os.read(device, LARGEST + 8192)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            raise
        _, opcode, unique, node = struct.unpack_from("<2I2Q", request)
        if opcode in WITHOUT_REPLY:
            continue
        try:
            code, body = 0, server.answer(opcode, node, request[40:])
        except OSError as error:
            code, body = -error.errno, b""
        os.write(device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)


def main():
    backing, mountpoint = Path(sys.argv[1]), sys.argv[2].encode()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    if libc.mount(b"wooly-test", mountpoint, b"fuse", 0, options):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), sys.argv[2])

    def unmount_at_end():
        sys.stdin.read()
        libc.umount2(mountpoint, MNT_DETACH)

    threading.Thread(target=unmount_at_end, daemon=True).start()
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    serve(device, Server(backing))


if __name__ == "__main__":
    main()
