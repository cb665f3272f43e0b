"""How clients and the store talk: msgpack frames and file descriptors over a Unix socket (``docs/protocol.md``)."""
