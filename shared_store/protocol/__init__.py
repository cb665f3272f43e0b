"""Communication between clients, store and keeper: msgpack frames and fds over Unix sockets (``docs/protocol.md``)."""
