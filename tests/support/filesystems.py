"""File systems that tests mount: small ones in memory, to be filled or made read-only, and a FUSE one that lies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path


class SmallDisk:
    """A tmpfs of 1 MiB over a directory."""

    def __init__(self, directory):
        self.directory = directory
        self._filling = directory / "filling"
        self._mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=64,mode=700", "none", str(directory))

    def fill(self):
        """Take the last byte and the last inode."""
        with self._filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with contextlib.suppress(OSError):
            for number in range(100):
                (self.directory / f"filling-{number}").touch()
        found = os.statvfs(self.directory)
        assert (found.f_bavail, found.f_ffree) == (0, 0)

    def empty(self):
        """Give the room back."""
        for file in self.directory.glob("filling*"):
            file.unlink()

    def read_only(self):
        """Possible only while nobody has a file open for writing."""
        self._mount("-o", "remount,ro", str(self.directory))

    def writable(self):
        self._mount("-o", "remount,rw", str(self.directory))

    def unmount(self):
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    @staticmethod
    def _mount(*arguments):
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


def may_mount():
    """Whether this process may mount file systems."""
    if os.getuid() != 0:
        return False
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return done.returncode == 0


class ObjectStore:
    """A directory that is also mounted through FUSE, at ``mounted``, with inodes and times that never change."""

    def __init__(self, directory):
        self.backing, self.mounted = directory / "objects", directory / "mounted"
        self.backing.mkdir()
        self.mounted.mkdir()
        program = Path(__file__).with_name("fuse_main.py")
        self._server = subprocess.Popen(
            [sys.executable, str(program), str(self.backing), str(self.mounted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout.readline() == b"mounted\n"

    def unmount(self):
        self._server.communicate(timeout=30)  # it unmounts when its stdin ends
        assert self._server.returncode == 0


def may_mount_fuse():
    """Whether this process may mount file systems that it serves itself."""
    return may_mount() and os.access("/dev/fuse", os.R_OK | os.W_OK)
