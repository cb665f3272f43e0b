"""A client that sends arbitrary bytes and fds to the store, for tests of the protocol."""

from __future__ import annotations

import array
import itertools
import socket

from support.blocking import BlockingChannel

from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import messages, wire


class RawClient:
    """One connection."""

    def __init__(self, path, *, greet=True, timeout_s=10.0, protocol=messages.VERSION):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(str(path))
        self.channel = BlockingChannel(self.sock)
        if greet:
            self.send(messages.Hello(protocol, "raw", "0"))
            self.welcome = self.receive()
            assert isinstance(self.welcome, messages.Welcome)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def send(self, message, fds=()):
        self.channel.send(messages.encode(message), fds)

    def send_for_ever(self, make):
        """Send messages (of rising ids) until the store closes the connection, or does not read for the time-out."""
        for number in itertools.count(1):
            self.send(make(number))

    def send_frame(self, payload):
        self.send_bytes(wire.header(payload, 0) + payload)

    def send_bytes(self, data):
        self.sock.sendall(data)

    def send_fds(self, data, fds):
        self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def receive(self):
        """Return the next message that is not a push."""
        while True:
            frame = self.channel.receive()
            message = messages.decode_from_store(frame.payload)
            frame.fds.close()
            if not isinstance(message, messages.Push):
                return message

    def refusal(self):
        """Return the code of the error that ends the connection. Skips earlier messages."""
        while True:
            message = self.receive()
            if isinstance(message, messages.Failed) and message.id == 0:
                assert self.ended()
                return message.code

    def ended(self):
        """Wait for the end of the connection. Return False after the time-out."""
        while True:
            try:
                self.receive()
            except ConnectionLostError as error:
                return not isinstance(error.__cause__, TimeoutError)
