"""A client that says what it likes: bytes and fds on the store's socket, for testing what the store makes of them."""

from __future__ import annotations

import array
import socket

from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import messages, wire


class RawClient:
    """One connection. `messages` of the protocol, or anything else."""

    def __init__(self, path, *, greet=True, timeout_s=10.0):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(str(path))
        self.channel = wire.BlockingChannel(self.sock)
        if greet:
            self.send(messages.Hello(messages.VERSION, "raw", "0"))
            assert isinstance(self.receive(), messages.Welcome)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def send(self, message, fds=()):
        self.channel.send(messages.encode(message), fds)

    def send_for_ever(self, message):
        """Until the socket is closed at the other end, or takes no more for long."""
        while True:
            self.send(message)

    def send_frame(self, payload):
        self.send_bytes(wire.header(payload, 0) + payload)

    def send_bytes(self, data):
        self.sock.sendall(data)

    def send_fds(self, data, fds):
        self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def receive(self):
        """The next message that is no push."""
        while True:
            frame = self.channel.receive()
            message = messages.decode_from_store(frame.payload)
            frame.fds.close()
            if not isinstance(message, messages.Push):
                return message

    def refusal(self):
        """The error that ends the connection: its code. Everything that comes before it is skipped."""
        while True:
            message = self.receive()
            if isinstance(message, messages.Failed) and message.id == 0:
                assert self.ended()
                return message.code

    def ended(self):
        """Whether the store closes the connection (waits for it)."""
        while True:
            try:
                self.receive()
            except ConnectionLostError as error:
                return not isinstance(error.__cause__, TimeoutError)
