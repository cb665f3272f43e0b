"""The errors of wooly: one class for each failure.

A class has a stable ``code``, which programs may compare and the protocol carries, and an ``exit_code`` for the command
line. The docstring of a class is its meaning. The message says what happened and the next step. It is written where the
error is raised, because the facts are known there.
"""

from __future__ import annotations

from typing import ClassVar


class WoolyError(Exception):
    """Base class of every failure of wooly."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class ConfigError(WoolyError):
    """An option, an environment variable or a path is not valid."""

    code = "config"
    exit_code = 2


class PathTooLongError(ConfigError):
    """The path of a Unix socket exceeds the kernel's 107 bytes."""

    code = "path_too_long"


class UnsafePathError(ConfigError):
    """Other users could have created the runtime directory or socket: its owner or mode is wrong, or it is a link."""

    code = "unsafe_path"


class StoreUnavailableError(WoolyError):
    """No store answers at the socket, and none was or could be started."""

    code = "store_unavailable"
    exit_code = 3


class StoreRunningError(WoolyError):
    """The runtime directory already has a store."""

    code = "store_running"
    exit_code = 3


class ConnectionLostError(StoreUnavailableError):
    """The connection to the store ended during a request."""

    code = "connection_lost"


class TimedOutError(WoolyError):
    """A time limit passed."""

    code = "timed_out"
    exit_code = 4


class RequestCancelledError(WoolyError):
    """A client cancelled its request before it was answered. It had no effect."""

    code = "cancelled"
    exit_code = 4


class ProtocolError(WoolyError):
    """A peer violated the protocol: malformed bytes, a truncated frame, or an unexpected message."""

    code = "protocol"
    exit_code = 5


class ProtocolVersionError(ProtocolError):
    """Client and store use different versions of the protocol."""

    code = "protocol_version"


class MessageTooLargeError(ProtocolError):
    """A frame exceeds the size limit of its sender."""

    code = "message_too_large"


class NotReadingError(ProtocolError):
    """A client does not read its socket, so that the store's messages for it exceed the limit."""

    code = "not_reading"


class PermissionDeniedError(WoolyError):
    """The store does not admit this user, or the request is for administrators."""

    code = "permission_denied"
    exit_code = 6


class TooManyClientsError(WoolyError):
    """The store has reached its limit of connections."""

    code = "too_many_clients"
    exit_code = 7


class TooManyRequestsError(WoolyError):
    """A peer has reached the limit of requests that it may have under way over one connection."""

    code = "too_many_requests"
    exit_code = 7


class DeclinedError(WoolyError):
    """A client declined a request of the store; the message has its reason."""

    code = "declined"
    exit_code = 22


class OutOfMemoryError(WoolyError):
    """A segment could not be allocated: the device is full, or its limit is reached."""

    code = "out_of_memory"
    exit_code = 8


class MemoryBackendError(WoolyError):
    """A system or driver call of a memory backend failed, for another reason than lack of memory."""

    code = "memory"
    exit_code = 8


class UnknownDeviceError(ConfigError):
    """There is no memory backend for this device."""

    code = "unknown_device"


class ModelNotFoundError(WoolyError):
    """The store has no model with this key or key prefix."""

    code = "model_not_found"
    exit_code = 9


class ModelInUseError(WoolyError):
    """The model cannot be removed: it has readers or a publisher."""

    code = "model_in_use"
    exit_code = 10


class WorkloadNotFoundError(WoolyError):
    """The store has no workload with this name, or this client speaks for none."""

    code = "workload_not_found"
    exit_code = 23


class NotPublisherError(ProtocolError):
    """A client tried to plan, fill or commit a model without being its publisher."""

    code = "not_publisher"


class DigestMismatchError(WoolyError):
    """Bytes do not match their digest."""

    code = "digest_mismatch"
    exit_code = 11


class CheckpointError(WoolyError):
    """The checkpoint cannot be read, has no weights, or changed while it was read."""

    code = "checkpoint"
    exit_code = 12


class UnsupportedError(WoolyError):
    """This model or configuration cannot be shared (it can be loaded the stock way), or the peer lacks the request."""

    code = "unsupported"
    exit_code = 13


class BindingError(WoolyError):
    """A model could not be bound to the store's tensors: a tensor is missing, or is still a placeholder."""

    code = "binding"
    exit_code = 14


class CommitFailedError(WoolyError):
    """A model was loaded and works, but is not shared: the store is gone, or refused it."""

    code = "commit_failed"
    exit_code = 15


class SharedWriteError(WoolyError):
    """An operation would write to shared weights, which are mapped read-only."""

    code = "shared_write"
    exit_code = 16


class ExclusiveError(WoolyError):
    """A workload may not use a device: another one has it for itself, or this one would, and others use it."""

    code = "exclusive"
    exit_code = 24


class SavedModelError(WoolyError):
    """A saved model cannot be restored: it is incomplete, was changed, or has another format or version."""

    code = "saved_model"
    exit_code = 19


class DiskError(WoolyError):
    """A model could not be written to disk: the disk is full, or the file system refuses."""

    code = "disk"
    exit_code = 20


class OfferRefusedError(WoolyError):
    """A restarted store refused a client's offer of a model: it does not match its description, or is not needed."""

    code = "offer_refused"
    exit_code = 17


class UpgradeError(WoolyError):
    """The store was not replaced by another version. It goes on unchanged."""

    code = "upgrade"
    exit_code = 18


class CatalogUnavailableError(WoolyError):
    """The catalog's Redis or Valkey server does not answer, or its address is unknown."""

    code = "catalog_unavailable"
    exit_code = 21


def _all_subclasses(cls: type[WoolyError]) -> list[type[WoolyError]]:
    return [cls, *(sub for direct in cls.__subclasses__() for sub in _all_subclasses(direct))]


def by_code(code: str) -> type[WoolyError]:
    """Return the class of a code from the wire; :class:`WoolyError` for a code that this version does not know."""
    return next((cls for cls in _all_subclasses(WoolyError) if cls.code == code), WoolyError)
