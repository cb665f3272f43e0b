"""Compute by priority: workloads of one device take turns at step boundaries, as a process of the store's decides.

Each workload has a page of shared memory (:mod:`layout`) and a socket to the arbiter. It writes what it does, and reads
whether it may begin a step; while it is alone, a step makes no system call. The arbiter (:mod:`arbiter`) reads the
pages, decides (:mod:`decision`, a pure function), and writes. The socket carries no content: a byte says "look at the
page", and its end says that a side is gone.

:mod:`gate` is the workload's side. It does not know the store: its caller passes it the page and the socket.
"""
