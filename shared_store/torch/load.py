"""Loading a shared model, for every engine: connect, identify, obtain, attach or publish, retain.

The engine's own steps are passed in, see :mod:`shared_store.torch.steps`. A model that cannot be shared falls back to
the engine's stock loading, see :mod:`shared_store.torch.fallback`.
"""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from shared_store.base import envs
from shared_store.base import manifest as manifests
from shared_store.base.errors import WoolyError
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.client.workload import describe
from shared_store.disk.cache import available
from shared_store.disk.obtain import Need, Opened, obtain
from shared_store.disk.saver import save_in_background
from shared_store.memory import Backend
from shared_store.torch.devices import backend_of, store_device
from shared_store.torch.fallback import Fallback
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.opening import Opening, key_of, progress
from shared_store.torch.publish import Publication, publish
from shared_store.torch.reporting import Reporting
from shared_store.torch.steps import Identity, Loaded, LoadSteps, Shared

R = TypeVar("R")

SHARE_MIN_BYTES = 16 << 10
"""Smaller tensors are copied into the process, because engines write to small ones."""

TIMEOUT_S = 1800.0
"""Seconds that another process may take to load the same model."""


@dataclass(frozen=True)
class Settings:
    """How an engine loads.

    Attributes:
        engine: the engine's name.
        version: the engine's version.
        fallback: the rule for models that cannot be shared.
        runtime_dir: the store's directory; None is the default of ``WOOLY_RUNTIME_DIR``.
        timeout_s: seconds that another process may take to load the same model.
        publish: load and publish a model that the store does not have; False makes that an error.
        restore_from: a directory of ``wooly save`` to restore the model from; None looks in the cache.
        min_bytes: smaller tensors are copied instead of mapped.
        devices: the store's names of the devices that this process uses, for the status.
        workload: settings of the workload of this process.
        member_of: the id of that workload; empty: the environment's.
    """

    engine: str
    version: str
    fallback: Fallback
    runtime_dir: Path | None = None
    timeout_s: float = TIMEOUT_S
    publish: bool = True
    restore_from: Path | None = None
    min_bytes: int = SHARE_MIN_BYTES
    devices: tuple[str, ...] = ()
    workload: WorkloadSettings = field(default_factory=WorkloadSettings)
    member_of: str = ""

    @property
    def named(self) -> str:
        """The engine's name and version, as the store's status shows them."""
        return f"{self.engine} {self.version}"

    @property
    def log(self) -> logging.Logger:
        """The engine's logger."""
        return self.fallback.log

    def connect(self, name: str) -> Session:
        """Connect to the store, for a model. Raises as :meth:`Session.connect` does."""
        return Session.connect(
            self.runtime_dir,
            name=f"{self.engine} {name}",
            identity=describe(self.engine, self.devices, self.workload, member_of=self.member_of),
        )


def load(steps: LoadSteps[R], settings: Settings) -> R:
    """Load a model: attach to it, publish it, or fall back.

    Args:
        steps: the engine's part.
        settings: how to load.

    Returns:
        What the engine's own load function returns.

    Raises:
        WoolyError: the model cannot be shared, and ``settings.fallback`` does not allow stock loading.
    """
    session: Session | None = None
    try:
        steps.prepare()
        session = settings.connect(steps.name)
        with steps.sharing():
            return _SharedLoad(steps, settings, session).run().result
    except WoolyError as error:
        settings.fallback.report(session, steps.name, error)
        return steps.load_stock()
    except BaseException:
        if session is not None:
            session.close()  # ends a publication that other clients wait for
        raise


class _SharedLoad(Generic[R]):
    """One load over an open session."""

    def __init__(self, steps: LoadSteps[R], settings: Settings, session: Session) -> None:
        self._steps = steps
        self._settings = settings
        self._session = session
        self._began = time.perf_counter()

    def run(self) -> Loaded[R]:
        """Attach, or publish where the store grants that."""
        identity = self._steps.identify()
        backend = backend_of(identity.device)
        if self._loads_ahead(identity, backend):
            return self._load_ahead(identity, backend)
        with key_of(identity, self._session, self._settings.timeout_s) as key:
            opened = self._obtain(key, backend)
        if opened is None:
            return self._publish(key, self._steps.load_to_publish(), identity)
        return self._attach(opened, backend)

    def _obtain(self, key: str, backend: Backend) -> Opened | None:
        return obtain(self._session, self._need(key), backend, progress)

    def _need(self, key: str) -> Need:
        settings = self._settings
        return Need(
            key,
            self._steps.name,
            settings.named,
            publish=settings.publish,
            timeout_s=settings.timeout_s,
            restore_from=settings.restore_from,
        )

    def _loads_ahead(self, identity: Identity, backend: Backend) -> bool:
        """Return True if the model should be loaded while its checkpoint is hashed.

        That is right if nobody is likely to have it. Where it turns out otherwise, the loaded model is dropped.
        """
        settings, checkpoint = self._settings, identity.checkpoint
        elsewhere = settings.restore_from is not None or available() is not None
        if not self._steps.loads_ahead or not settings.publish or elsewhere or envs.VERIFY.get():
            return False
        if not checkpoint.settled or checkpoint.recall(self._session) is not None:
            return False
        return not any(
            (model.device, model.engine, model.name) == (backend.device, settings.named, self._steps.name)
            for model in self._session.status().models
        )

    def _load_ahead(self, identity: Identity, backend: Backend) -> Loaded[R]:
        """Load the model while its checkpoint is hashed, and publish it if nobody has it."""
        keys: list[str] = []

        def open_model(key: str) -> Opened | None:
            keys.append(key)
            return self._obtain(key, backend)

        with Opening(identity, self._session, open_model, self._settings.timeout_s) as opening:
            loaded = self._steps.load_to_publish() if opening.hashes() else None
            try:
                opened = opening.result()
            except WoolyError as error:
                if loaded is None:
                    raise
                return self._keep_private(loaded, error)
        if opened is not None:
            if loaded is not None:
                self._steps.discard(loaded)
                del loaded
            return self._attach(opened, backend)
        return self._publish(keys[0], loaded or self._steps.load_to_publish(), identity)

    def _attach(self, opened: Opened, backend: Backend) -> Loaded[R]:
        attached, fds = opened
        with fds:
            manifest = manifests.decode(attached.manifest)
            with mapping_phase(self._session, backend):
                mapped = MappedModel(backend, manifest.blobs, attached.places, attached.segments, fds.filenos())
                mapped.map_for_reading()
        loaded, bound = self._steps.attach(manifest, mapped)
        return self._retain(Shared(loaded, self._session, manifest, mapped, bound, published=False), "attached")

    def _publish(self, key: str, loaded: Loaded[R], identity: Identity) -> Loaded[R]:
        loading_s = time.perf_counter() - self._began
        backend = backend_of(identity.device)
        try:
            identity.checkpoint.check_unchanged()
            description = self._steps.describe(loaded)
            publication = Publication(
                key=key,
                name=self._steps.name,
                engine=self._settings.named,
                device=store_device(identity.device),
                state=description.state,
            )
            with progress("wooly: publishing", 0) as copied:
                manifest, mapped, bound = publish(
                    self._session,
                    publication,
                    loaded.model,
                    backend,
                    min_bytes=self._settings.min_bytes,
                    select=description.select,
                    progress=copied,
                )
        except WoolyError as error:
            return self._keep_private(loaded, error)
        save_in_background(key, self._settings.runtime_dir)
        shared = Shared(loaded, self._session, manifest, mapped, bound, published=True)
        return self._retain(shared, f"loaded in {loading_s:.3f} s and published")

    def _keep_private(self, loaded: Loaded[R], error: WoolyError) -> Loaded[R]:
        """Fall back to a model that was loaded to be published."""
        self._settings.fallback.report(self._session, self._steps.name, error)
        self._steps.left_private(loaded)
        return loaded

    def _retain(self, shared: Shared[R], how: str) -> Loaded[R]:
        """Report a shared model, and close the session with it: the connection is the lease."""
        bound = self._steps.bound(shared)
        log, name, key = self._settings.log, self._steps.name, shared.manifest.key
        reporting = Reporting(self._session, key, name, bound.private_bytes, log)
        reporting.report()
        reporting.count_written(shared.mapped)
        weakref.finalize(shared.loaded.model, self._session.close)
        log.info(
            "wooly: %s %s in %.3f s (%d tensors, %.1f MiB mapped, %.1f MiB private, key %s)",
            how,
            name,
            time.perf_counter() - self._began,
            bound.tensors,
            bound.mapped_bytes / 2**20,
            bound.private_bytes / 2**20,
            key[:12],
        )
        return shared.loaded
