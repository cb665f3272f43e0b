"""The process behind `preloaded.Preloaded`: import modules once, then fork a process for each request.

    python preloaded_main.py SOCKET_FD MODULE...

A forked process gets the environment, the working directory, the arguments and the standard streams of its request,
and runs its program as ``python PROGRAM`` would. Forking is safe as long as the imports start no thread: the number of
threads is the first message on the socket.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
import warnings
from pathlib import Path


def main() -> None:
    inherited = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sys.argv[2:]:
            importlib.import_module(name)
    set_by_imports = {name: value for name, value in os.environ.items() if inherited.get(name) != value}
    # Collections in a forked process need not visit, and thereby copy, what the imports left.
    gc.collect()
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request, set_by_imports)


def serve(control: socket.socket) -> dict | None:
    """Answer requests until the other end closes (None). Returns the request in each forked process."""
    control.send(str(len(os.listdir("/proc/self/task"))).encode())  # noqa: PTH208 - only counted
    children: dict[int, tuple[int, int]] = {}  # by pidfd: the pid, and the pipe that takes its exit code
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready != control.fileno():
                poller.unregister(ready)
                report(ready, *children.pop(ready))
                continue
            message, fds, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not message:
                return None
            *streams, status = fds
            pid = os.fork()
            if pid == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for fd in (*fds, *children, *(pipe for _, pipe in children.values())):
                    os.close(fd)
                control.close()
                return json.loads(message)
            for stream in streams:
                os.close(stream)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, status)
            poller.register(pidfd, select.POLLIN)
            socket.send_fds(control, [str(pid).encode()], [pidfd])


def report(pidfd: int, pid: int, status: int) -> None:
    """Reap a process and write its exit code to its pipe."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # the test did not wait for it
        os.write(status, str(code).encode())
    os.close(status)
    os.close(pidfd)


def become(request: dict, set_by_imports: dict[str, str]) -> None:
    """Run the request's program in this process, as its main module."""
    os.environ.clear()
    os.environ.update(set_by_imports | request["environment"])
    os.chdir(request["directory"])
    sys.argv[1:] = request["arguments"]
    program = request["program"]
    if Path(program).is_file():
        sys.argv[0] = program
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
