"""A filter that kills a process at any system call but the ones with which a test ends."""

from __future__ import annotations

FILTER = """
libc = ctypes.CDLL(None, use_errno=True)
WRITE, EXIT_GROUP = {"x86_64": (1, 231), "aarch64": (64, 94)}[os.uname().machine]
# A filter that kills the process at any other system call (seccomp(2), bpf of linux/filter.h).
LOAD, IF_EQUAL, RETURN, ALLOW, KILL = 0x20, 0x15, 0x06, 0x7FFF0000, 0x80000000
program = [(LOAD, 0, 0, 0), (IF_EQUAL, 2, 0, WRITE), (IF_EQUAL, 1, 0, EXIT_GROUP), (RETURN, 0, 0, KILL),
           (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
length = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, length, 0, 0) == 0
"""
"""Code that installs it. Its program has imported ctypes, os and struct."""
