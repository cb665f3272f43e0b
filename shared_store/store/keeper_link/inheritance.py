"""What a store starts with, from the command line or from its keeper."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import shared_store
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.options import ServeOptions
from shared_store.store.keeper_link.channel import ControlChannel


@dataclass(frozen=True)
class Inheritance:
    """What a store starts with.

    Attributes:
        options: its settings.
        listen: the listening socket.
        lock: descriptor of the runtime directory's lock, open for the life of the process.
        held: segments and metadata of the store before this one.
        keeper: pid of the keeper; 0 without one.
        restarts: how often the keeper has restarted the store.
        supervised: a service manager replaces the keeper if it dies.
    """

    options: ServeOptions
    listen: socket.socket
    lock: int
    held: DurableState
    keeper: int = 0
    restarts: int = 0
    supervised: bool = False


def inherit(channel: ControlChannel) -> Inheritance:
    """Report to the keeper that this process is prepared; receive the state and the message to begin.

    Raises:
        ConnectionLostError: the keeper ended.
    """
    channel.send(keeper_messages.Prepared(shared_store.__version__))
    held = DurableState()
    while True:
        message, fds = channel.wait_for()
        if isinstance(message, keeper_messages.Begin):
            listen, lock = (fd.detach() for fd in fds.detach())
            options = ServeOptions.from_json(message.options)
            sock = socket.socket(fileno=listen)
            return Inheritance(options, sock, lock, held, message.keeper, message.restarts, message.supervised)
        if isinstance(message, keeper_messages.StateChange):
            held.apply(message, fds)
        fds.close()
