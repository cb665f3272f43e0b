"""A scripted store: a socket at which a test plays the store, message by message."""

from __future__ import annotations

import os
import socket
import threading

from support.blocking import BlockingChannel
from support.waiting import readable

from shared_store.protocol import messages
from shared_store.runtime.paths import prepare


class ScriptedStore:
    """Listens in a runtime directory. Connections greet themselves; everything else is the test's."""

    def __init__(self, directory):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(prepare(directory).socket))
        self.listener.listen()
        self.peers = []

    def accept(self):
        """Accept a client, and receive its greeting. Returns the connection and the greeting."""
        assert readable(self.listener, 10.0), "no client connects"
        peer = Peer(self.listener.accept()[0])
        self.peers.append(peer)
        return peer, peer.receive()

    def welcome(self, connect, *, capabilities=(), protocol=messages.VERSION):
        """Greet the client that `connect()` makes. Returns the connection, and the result of `connect`."""
        made = []
        client = threading.Thread(target=lambda: made.append(connect()))
        client.start()
        peer, hello = self.accept()
        assert hello.protocol == protocol
        peer.send(messages.Welcome(protocol, "0", os.getpid(), 1, capabilities))
        client.join(10)
        return peer, made[0]

    def close(self):
        for peer in self.peers:
            peer.close()
        self.listener.close()


class Peer:
    """A connection of a client."""

    def __init__(self, sock):
        sock.settimeout(10.0)
        self.channel = BlockingChannel(sock)

    def send(self, message, fds=()):
        self.channel.send(messages.encode(message), fds)

    def send_payload(self, payload):
        self.channel.send(payload)

    def receive(self):
        frame = self.channel.receive()
        with frame.fds:
            return messages.decode_from_client(frame.payload)

    def silent(self, seconds):
        """Return whether nothing arrives for some time."""
        return not readable(self.channel.sock, seconds)

    def close(self):
        self.channel.close()
