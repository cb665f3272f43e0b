"""The service manager's side of `sd_notify(3)`: a datagram socket that records lines and stores fds.

Run as a program (``NAMES FDS COMMAND...``), it passes stored fds on as in `sd_listen_fds(3)`, and executes the command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading

FIRST_FD = 3


class ServiceManager:
    """Receives in a thread until closed. `lines`: all lines in order. `stored`: fds by name."""

    def __init__(self, path):
        self.lines = []
        self.stored = {}
        self._path = str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self._path)
        self._reads = threading.Event()
        self._reads.set()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    @property
    def environment(self):
        return {"NOTIFY_SOCKET": self._path, "WATCHDOG_USEC": "30000000"}

    def through(self):
        """Return a command that passes the stored fds on, and the fds that it must inherit."""
        fds = tuple(self.stored.values())
        return [sys.executable, __file__, ":".join(self.stored), ":".join(map(str, fds))], fds

    def pause(self):
        """Read nothing more after the next message, which waits unprocessed."""
        self._reads.clear()

    def resume(self):
        self._reads.set()

    def close(self):
        self.resume()
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.sendto(b"", self._path)
        self._thread.join()
        self._sock.close()
        for fd in self.stored.values():
            os.close(fd)

    def _listen(self):
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 16)
            if not data:
                return
            self._reads.wait()
            lines = data.decode().split("\n")
            values = dict(line.split("=", 1) for line in lines)
            if "FDSTORE" in values:
                self._forget(values["FDNAME"])
                (self.stored[values["FDNAME"]],) = fds
            elif "FDSTOREREMOVE" in values:
                self._forget(values["FDNAME"])
            else:
                for fd in fds:  # of `BARRIER=1`: closing it says that everything before is done
                    os.close(fd)
            self.lines += lines

    def _forget(self, name):
        fd = self.stored.pop(name, None)
        if fd is not None:
            os.close(fd)


def main():
    names, numbers, *command = sys.argv[1:]
    aside = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers.split(":") if number]
    for place, fd in enumerate(aside, FIRST_FD):
        os.dup2(fd, place)
    said = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(aside)), "LISTEN_FDNAMES": names}
    os.execve(command[0], command, {**os.environ, **said})


if __name__ == "__main__":
    main()
