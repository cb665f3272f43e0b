"""Every failure that wooly reports, one class each.

A class carries a stable ``code`` (a word that programs may compare, also over the wire), an ``exit_code`` for the
command line, and a message that says what happened and what to do next. The docstring of a class is its meaning;
the text is made where the error is raised, because only there are the facts known.
"""

from __future__ import annotations

from typing import ClassVar


class WoolyError(Exception):
    """Anything that wooly refuses or fails to do."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class ConfigError(WoolyError):
    """An option, an environment variable or a path is not usable as given."""

    code = "config"
    exit_code = 2


class PathTooLongError(ConfigError):
    """A Unix socket path over the kernel's 107 bytes."""

    code = "path_too_long"


class UnsafePathError(ConfigError):
    """A runtime directory or socket that others could have planted: wrong owner, open permissions, or a link."""

    code = "unsafe_path"


class StoreUnavailableError(WoolyError):
    """No store answers at the socket, and none could be started."""

    code = "store_unavailable"
    exit_code = 3


class StoreRunningError(WoolyError):
    """A second store was started for a runtime directory that has one."""

    code = "store_running"
    exit_code = 3


class ConnectionLostError(StoreUnavailableError):
    """The store went away in the middle of a conversation."""

    code = "connection_lost"


class TimedOutError(WoolyError):
    """Something did not happen in the time that was allowed for it."""

    code = "timed_out"
    exit_code = 4


class ProtocolError(WoolyError):
    """A peer sent what the protocol does not allow: garbage, a truncated frame, a message out of turn."""

    code = "protocol"
    exit_code = 5


class ProtocolVersionError(ProtocolError):
    """The two sides speak different protocol versions."""

    code = "protocol_version"


class MessageTooLargeError(ProtocolError):
    """A frame over the size that its sender is allowed."""

    code = "message_too_large"


class PermissionDeniedError(WoolyError):
    """The peer's uid is not on the store's allow-list."""

    code = "permission_denied"
    exit_code = 6


class TooManyClientsError(WoolyError):
    """The store has as many connections as it accepts."""

    code = "too_many_clients"
    exit_code = 7


class OutOfMemoryError(WoolyError):
    """A segment could not be created: the device, or the limit set for it, has no room."""

    code = "out_of_memory"
    exit_code = 8


class MemoryBackendError(WoolyError):
    """A memory backend's system call failed for another reason than lack of room."""

    code = "memory"
    exit_code = 8


class UnknownDeviceError(ConfigError):
    """A device that this store has no memory backend for."""

    code = "unknown_device"


class ModelNotFoundError(WoolyError):
    """No model with that key (or key prefix) is in the store."""

    code = "model_not_found"
    exit_code = 9


class ModelInUseError(WoolyError):
    """The model has readers or a publisher, so it cannot be removed."""

    code = "model_in_use"
    exit_code = 10


class NotPublisherError(ProtocolError):
    """A client that was not granted the publication of a model tried to plan or commit it."""

    code = "not_publisher"


class DigestMismatchError(WoolyError):
    """Bytes in the store are not the bytes that their digest names."""

    code = "digest_mismatch"
    exit_code = 11


class CheckpointError(WoolyError):
    """The checkpoint cannot be read, has no weights, or changed while it was being read."""

    code = "checkpoint"
    exit_code = 12


class UnsupportedError(WoolyError):
    """This model or configuration cannot be shared; it can be loaded the stock way."""

    code = "unsupported"
    exit_code = 13


class BindingError(WoolyError):
    """A model could not be bound to the store's tensors: one is missing, or was left on a placeholder."""

    code = "binding"
    exit_code = 14


class CommitFailedError(WoolyError):
    """A model was loaded and is usable, but is its process's own: the store is gone or did not take it."""

    code = "commit_failed"
    exit_code = 15


class SharedWriteError(WoolyError):
    """Something would write to weights that other processes read, where memory is mapped read-only."""

    code = "shared_write"
    exit_code = 16


class SavedModelError(WoolyError):
    """A saved model cannot be taken back: it is incomplete, was changed, or is not wooly's or not of this version."""

    code = "saved_model"
    exit_code = 19


class DiskError(WoolyError):
    """A model could not be written to disk: no room, or the file system refuses."""

    code = "disk"
    exit_code = 20


class OfferRefusedError(WoolyError):
    """What a client offered to a restarted store is not what it says it is, or is not wanted."""

    code = "offer_refused"
    exit_code = 17


class UpgradeError(WoolyError):
    """The store was not replaced by another version; it goes on as it was."""

    code = "upgrade"
    exit_code = 18


class CatalogUnavailableError(WoolyError):
    """The Redis or Valkey server with the catalog does not answer, or nobody knows where it is."""

    code = "catalog_unavailable"
    exit_code = 21


def _all_subclasses(cls: type[WoolyError]) -> list[type[WoolyError]]:
    return [cls, *(sub for direct in cls.__subclasses__() for sub in _all_subclasses(direct))]


def by_code(code: str) -> type[WoolyError]:
    """The class for a code that came over the wire; :class:`WoolyError` for one that this version does not know."""
    return next((cls for cls in _all_subclasses(WoolyError) if cls.code == code), WoolyError)
