"""What wraps transformers' own functions: what ``from_pretrained`` was asked for, and how weights are loaded."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from shared_store.base import envs, manifest
from shared_store.base.errors import UnsupportedError, WoolyError
from shared_store.base.keys import weight_key
from shared_store.client.identify import Checkpoint
from shared_store.client.session import Session
from shared_store.disk.obtain import Need, obtain
from shared_store.disk.saver import save_in_background
from shared_store.torch.bind import Bound
from shared_store.torch.devices import backend_of, store_device
from shared_store.torch.load import SHARE_MIN_BYTES, TIMEOUT_S, keep, progress, report_fallback
from shared_store.torch.mapped_model import MappedBlobs
from shared_store.torch.publish import Publication, publish
from shared_store.torch.tensors import NamedTensor
from wooly_hf import compat, guards, identity
from wooly_hf.attach import attach
from wooly_hf.device_map import parse
from wooly_hf.sharing import leave_files

log = logging.getLogger(__name__)


@dataclass
class _Request:
    """A call of ``from_pretrained`` that is to share weights; the first load in it is the model's.

    Attributes:
        asked: by its device map. Otherwise by the environment, for every model that goes onto one device.
        taken: the model's load has begun.
    """

    asked: bool
    taken: bool = False

    def go_stock(self, name: str, error: UnsupportedError) -> None:
        """Give up sharing, before there is a connection to a store. Raises where ``WOOLY_STRICT`` says so."""
        self.taken = True
        session: Session | None = None
        try:
            session = Session.connect(name=f"transformers {name}")
        except WoolyError as unreachable:
            log.debug("wooly: no store counts this: %s", unreachable)
        _tell(session, name, error)


_request: ContextVar[_Request | None] = ContextVar("wooly_request", default=None)
_publishing: ContextVar[bool] = ContextVar("wooly_publishing", default=False)


def wrap_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``PreTrainedModel.from_pretrained`` (as a plain function), which knows device maps with wooly."""

    @functools.wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("device_map")
        wanted = parse(given)
        if wanted is not None:
            kwargs["device_map"] = wanted.inner
        asked = wanted is not None
        # None also hides the request of a model that this one is a part of.
        request = _Request(asked) if asked or envs.WEIGHTS_DEDUP.get() else None
        if request is not None:
            try:
                compat.check_arguments(kwargs)
            except UnsupportedError as error:
                request.go_stock(_asked_for(cls, args, kwargs), error)
        token = _request.set(request)
        try:
            model = stock(cls, *args, **kwargs)
        finally:
            _request.reset(token)
        if request is not None and not request.taken:
            request.go_stock(_asked_for(cls, args, kwargs), UnsupportedError("it has its own way to load weights"))
        return model

    return from_pretrained


def _asked_for(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a call of ``from_pretrained`` names: a checkpoint, or else the class."""
    return str((args[0] if args else kwargs.get("pretrained_model_name_or_path")) or cls.__name__)


def wrap_distributed(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What loads distributed checkpoints instead of ``_load_pretrained_model``: it goes the stock way."""

    @functools.wraps(stock)
    def load(model: nn.Module, folder: Any, *args: Any, **kwargs: Any) -> Any:
        request = _request.get()
        if request is not None and not request.taken:
            request.go_stock(str(folder), UnsupportedError("distributed checkpoints are read in parts"))
        return stock(model, folder, *args, **kwargs)

    return load


def wrap_load(stock: compat.Load) -> compat.Load:
    """``PreTrainedModel._load_pretrained_model``, which shares what it loads when that was asked for."""

    @functools.wraps(stock)
    def load(
        model: nn.Module, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        def load_stock() -> tuple[Any, Any]:
            return stock(model, state_dict, checkpoint_files, load_config, expected_keys)

        request = _request.get()
        if request is None or request.taken or expected_keys is not None:
            return load_stock()
        if not request.asked and not compat.onto_one_device(load_config):
            request.taken = True
            return load_stock()  # the environment asks for nothing there, so there is nothing to tell
        request.taken = True  # an adapter that is loaded later in the same call is this process's own
        loading = _Loading(model, checkpoint_files, load_config, load_stock)
        return loading.run(state_dict)

    return load


def wrap_warmup(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``caching_allocator_warmup``, not for a model that will be published.

    It takes GPU memory for the whole model in one piece, of which no part can be given back to the store while tensors
    move there: the peak would be two models.
    """

    @functools.wraps(stock)
    def warmup(*args: Any, **kwargs: Any) -> Any:
        return None if _publishing.get() else stock(*args, **kwargs)

    return warmup


class _Loading:
    """One model's loading: attached, published, or the stock way."""

    def __init__(
        self, model: nn.Module, files: list[str] | None, load_config: Any, load_stock: Callable[[], tuple[Any, Any]]
    ) -> None:
        self._model = model
        self._files = files or []
        self._load_config = load_config
        self._load_stock = load_stock
        self._name = str(load_config.pretrained_model_name_or_path)
        self._began = time.perf_counter()

    def run(self, state_dict: Any) -> tuple[Any, Any]:
        """Load. Raises :class:`WoolyError` only where ``WOOLY_STRICT`` says so."""
        session: Session | None = None
        try:
            session = Session.connect(name=f"transformers {self._name}")
            compat.check_supported(state_dict, self._files, self._load_config)
            return self._load_shared(session)
        except WoolyError as error:
            _tell(session, self._name, error)
            return self._load_stock()
        except BaseException:
            if session is not None:
                session.close()  # whoever waits for this process to publish must not wait any longer
            raise

    def _load_shared(self, session: Session) -> tuple[Any, Any]:
        device = compat.device_of(self._load_config)
        with self._key(session) as (key, checkpoint):
            backend = backend_of(device)
            need = Need(key, self._name, f"transformers {compat.version()}", publish=True, timeout_s=TIMEOUT_S)
            opened = obtain(session, need, backend, progress)
        if opened is None:
            return self._publish(session, key, checkpoint)
        attached, fds = opened
        described = manifest.decode(attached.manifest)
        blobs = MappedBlobs(backend, described.blobs, attached.places, attached.segments, fds)
        blobs.map_for_reading()
        bound = attach(self._model, described, blobs, min_bytes=SHARE_MIN_BYTES)
        info = compat.restore(self._model, self._load_config, described.state)
        self._keep(session, key, bound, "attached")
        return info, None

    @contextmanager
    def _key(self, session: Session) -> Iterator[tuple[str, Checkpoint]]:
        """The weight key. In the block, this process is first in line for it if it had to hash."""
        files = identity.named_files(self._files)
        device = compat.device_of(self._load_config)
        facts = identity.facts(self._model, files, self._load_config, device)
        checkpoint = Checkpoint(files)
        with (
            progress("wooly: hashing the checkpoint", checkpoint.nbytes) as hashed,
            checkpoint.digest(session, timeout_s=TIMEOUT_S, progress=hashed) as digest,
        ):
            yield weight_key(digest, facts), checkpoint

    def _publish(self, session: Session, key: str, checkpoint: Checkpoint) -> tuple[Any, Any]:
        token = _publishing.set(True)
        try:
            info, offloaded = self._load_stock()
        finally:
            _publishing.reset(token)
        device = compat.device_of(self._load_config)
        try:
            checkpoint.unchanged()
            publication = Publication(
                key=key,
                name=self._name,
                engine=f"transformers {compat.version()}",
                device=store_device(device),
                state=compat.outcome(self._model, self._load_config, info),
            )
            loaded = set(self._model.state_dict()) - info.missing_and_mismatched()

            def was_loaded(named: NamedTensor) -> bool:
                return named.kind != "attribute" and named.persistent and named.path in loaded

            with progress("wooly: publishing", 0) as copied:
                *_, bound = publish(
                    session,
                    publication,
                    self._model,
                    backend_of(device),
                    min_bytes=SHARE_MIN_BYTES,
                    select=was_loaded,
                    progress=copied,
                )
            save_in_background(key)
            if device.type == "cpu":
                leave_files(self._model)
            self._keep(session, key, bound, "published")
        except WoolyError as error:
            _tell(session, self._name, error)
        except BaseException:
            session.close()
            raise
        return info, offloaded

    def _keep(self, session: Session, key: str, bound: Bound, how: str) -> None:
        session.report(key, bound.private_bytes)
        keep(session, self._model)
        guards.watch(self._model)
        log.info(
            "wooly: %s %s in %.3f s (%d tensors, %.1f MiB mapped, %.1f MiB private, key %s)",
            how,
            self._name,
            time.perf_counter() - self._began,
            bound.tensors,
            bound.mapped_bytes / 2**20,
            bound.private_bytes / 2**20,
            key[:12],
        )


_told: set[tuple[str, str]] = set()


def _tell(session: Session | None, name: str, error: WoolyError) -> None:
    """Say once, and count each time, that a model is this process's own.

    Raises:
        WoolyError: the error itself, where ``WOOLY_STRICT`` is set.
    """
    if envs.STRICT.get():
        if session is not None:
            session.close()
        raise error
    if (name, str(error)) not in _told:
        _told.add((name, str(error)))
        log.warning(
            "wooly: %s is loaded the stock way, and not shared: %s [%s]. Set WOOLY_STRICT=1 to make this an error.",
            name,
            error,
            error.code,
        )
    report_fallback(session, name, error, log)
