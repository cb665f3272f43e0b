"""The model loaders behind ``--load-format wooly``, and ``auto`` if that is wanted.

They attach to a model that the store has, or load and publish it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_store.base import manifest as manifests
from shared_store.base.errors import BindingError, CheckpointError, UnsupportedError, WoolyError
from shared_store.base.keys import weight_key
from shared_store.client.identify import Checkpoint
from shared_store.client.session import Session
from shared_store.disk.obtain import Need, obtain
from shared_store.disk.saver import save_in_background
from shared_store.memory import Backend
from shared_store.protocol import messages
from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.bind import Binder, Bound, measure
from shared_store.torch.devices import backend_of, store_device
from shared_store.torch.load import keep, progress, report_fallback
from shared_store.torch.mapped_model import MappedBlobs
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.publish import Publication, publish
from wooly_vllm import compat, cpu_dispatch
from wooly_vllm.loading import identity, methods, rehearsal, state
from wooly_vllm.loading.options import Options, parse, split
from wooly_vllm.memory import refused_writes
from wooly_vllm.residency import sleep as sleeping

logger = compat.logger()
BaseModelLoader: Any = compat.find("vllm.model_executor.model_loader.base_loader", "BaseModelLoader")[0]
DefaultModelLoader: Any = compat.find("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")[0]

LOST_TOLERATED = 0.01
"""Share of the bytes that may go private after binding without a warning."""


class InnerLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's own loader of checkpoints, watched: what it read, and what state loading changed."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.before: state.Plain = {}
        self.read: set[Path] = set()
        self.left_behind: list[str] = []

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load, having noted the state before."""
        self.before = state.plain_state(model)
        unnamed = state.Unnamed(model)
        super().load_weights(model, model_config)
        self.left_behind = unnamed.changed(model, methods.rehearsed_layers(model).values())

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_weights(*args, **kwargs)
        self.read.update(Path(file) for file in prepared[1])
        return prepared


@dataclasses.dataclass(frozen=True)
class Request:
    """What vLLM asks a loader for. ``sleeps``: the engine may sleep."""

    vllm_config: Any
    model_config: Any
    prefix: str
    sleeps: bool = False

    @property
    def name(self) -> str:
        """What people call the model."""
        return str(self.model_config.served_model_name or self.model_config.model)

    @property
    def device(self) -> torch.device:
        """Where its weights go."""
        return identity.device_of(self.vllm_config)


class WoolyLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not typed for us
    """Loads a model once a node, and maps it everywhere else."""

    def __init__(self, load_config: Any) -> None:
        """Read the options. Raises :class:`ConfigError` for one that is not valid."""
        compat.warn_of_version()
        super().__init__(load_config)
        self.options, self._inner_extra = self._read(load_config.model_loader_extra_config)

    @staticmethod
    def _read(extra: Any) -> tuple[Options, dict[str, Any]]:
        """The options, and the extra config of the loader that reads the checkpoint."""
        return parse(extra), {}

    def download_model(self, model_config: Any) -> None:
        """Download the checkpoint, as the inner format does."""
        self._inner().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load weights into a model, in place.

        Raises:
            UnsupportedError: others read this model's weights.
        """
        sleeping.refuse_shared([model])
        self._inner().load_weights(model, model_config)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
        """The checkpoint's tensors, for vLLM to reload them in place. Raises as :meth:`load_weights` does."""
        sleeping.refuse_shared([model])
        return self._inner().get_all_weights(model_config, model)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Load a model: attached, published, or (where that is allowed) the stock way.

        Raises:
            WoolyError: it cannot be shared, and ``fallback`` is off.
        """
        request = Request(vllm_config, model_config, prefix)
        session: Session | None = None
        try:
            sleeping.install_in_workers()
            identity.check_supported(vllm_config, model_config, self.load_config, unproven=self.options.unproven)
            backend = backend_of(request.device)
            session = Session.connect(self.options.runtime_dir, name=f"vllm {request.name}")
            with compat.outside_sleep_pool() as sleeps:
                return self._load_shared(session, dataclasses.replace(request, sleeps=sleeps), backend)
        except WoolyError as error:
            if self.options.falls_back:
                return self._load_stock(request, session, error)
            _end(session)
            raise
        except BaseException:
            _end(session)  # whoever waits for this process to publish must not wait any longer
            raise

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes of shared weights that are there before this engine loads; vLLM charges them to it (0.32 on)."""
        from wooly_vllm.memory import accounting

        device = identity.device_of(vllm_config)
        if device.type != "cuda":
            return 0
        total = torch.cuda.mem_get_info(device)[1]
        return accounting.charge(accounting.external_bytes(vllm_config), total, vllm_config.cache_config)

    def resident_bytes(self, vllm_config: Any, model_config: Any) -> int:
        """Bytes of a model that the store has on this engine's device: 0 unless it is committed.

        Raises:
            WoolyError: the store or the checkpoint cannot be asked.
        """
        identity.check_supported(vllm_config, model_config, self.load_config, unproven=self.options.unproven)
        request = Request(vllm_config, model_config, "")
        with (
            Session.connect(self.options.runtime_dir, name=f"vllm {request.name}") as session,
            self._key(session, request, self._inner()) as (key, _),
        ):
            committed = (model for model in session.status().models if model.state == "committed")
            return next((model.bytes for model in committed if model.key == key), 0)

    @contextmanager
    def _key(self, session: Session, request: Request, inner: InnerLoader) -> Iterator[tuple[str, Checkpoint]]:
        """The model's weight key. In the block, this process is first in line for it if it had to hash."""
        cls = compat.model_class(request.model_config)
        checkpoint = Checkpoint(compat.weight_files(inner, request.model_config, cls))
        facts = identity.facts(request.vllm_config, request.model_config, self.options.inner_load_format)
        with (
            progress("wooly: hashing the checkpoint", checkpoint.nbytes) as hashed,
            checkpoint.digest(session, timeout_s=self.options.timeout_s, progress=hashed) as digest,
        ):
            yield weight_key(digest, facts), checkpoint

    def _load_shared(self, session: Session, request: Request, backend: Backend) -> nn.Module:
        began = time.perf_counter()
        inner = self._inner()
        with self._key(session, request, inner) as (key, checkpoint):
            need = Need(
                key,
                request.name,
                f"vllm {compat.version()}",
                publish=self.options.mode != "load",
                timeout_s=self.options.timeout_s,
                restore_from=self.options.restore_from,
            )
            opened = obtain(session, need, backend, progress)
        if opened is not None:
            return self._attach(session, request, backend, key, *opened, began=began)
        return self._publish(session, request, backend, key, inner, checkpoint, began=began)

    def _attach(
        self,
        session: Session,
        request: Request,
        backend: Backend,
        key: str,
        attached: messages.Attached,
        fds: tuple[int, ...],
        *,
        began: float,
    ) -> nn.Module:
        manifest = manifests.decode(attached.manifest)
        blobs = MappedBlobs(backend, manifest.blobs, attached.places, attached.segments, fds)
        blobs.map_for_reading()
        try:
            model, bound = self._build(request, manifest, blobs)
        except WoolyError:
            raise
        except Exception as error:  # whatever a constructor does not take: the stock way is open
            raise BindingError(
                f"the model could not be built of placeholders: {type(error).__name__}: {error}"
            ) from error
        bound = self._keep(session, request, manifest, model, bound, blobs)
        logger.info(
            "wooly: attached %s in %.3f s (%d tensors, %.1f MiB mapped, %.1f MiB private, key %s)",
            request.name,
            time.perf_counter() - began,
            bound.tensors,
            bound.mapped_bytes / 2**20,
            bound.private_bytes / 2**20,
            key[:12],
        )
        model.eval()
        return model

    def _build(self, request: Request, manifest: manifests.Manifest, blobs: MappedBlobs) -> tuple[nn.Module, Bound]:
        """Build the model of placeholders, and make it what the manifest says."""
        with compat.building(request.vllm_config, request.model_config):
            with request.device, Placeholders(self.options.share_min_bytes) as placeholders:
                model = compat.initialize(request.vllm_config, request.model_config, request.prefix)
            late = self._rehearsed(request, model)
            attributes, kernels = manifest.state["attributes"], manifest.state["kernels"]
            binder = Binder(model, manifest, blobs, placeholders, min_bytes=self.options.share_min_bytes)
            binder.bind(late.values(), completes_itself=compat.completes_itself)
            state.restore(model, attributes, but=late.values())
            with cpu_dispatch.shareable(request.device, bound=True):
                rehearsal.rehearse(binder, late.values(), request.device)
                done = (*late.values(), *methods.finished_layers(model))
                compat.post_process_bound(model, request.model_config, request.device, done)
            bound = binder.finish()
            state.restore(model, attributes)  # post-processing may have set some of it to its defaults
            rehearsal.check(model, late, kernels)
        return model, bound

    def _rehearsed(self, request: Request, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of a model to rehearse. Raises :class:`UnsupportedError` for one that may not be."""
        layers = methods.rehearsed_layers(model)
        if not self.options.unproven:
            methods.check_proven(layers, request.device)
        return layers

    def _publish(
        self,
        session: Session,
        request: Request,
        backend: Backend,
        key: str,
        inner: InnerLoader,
        checkpoint: Checkpoint,
        *,
        began: float,
    ) -> nn.Module:
        hashed = set(inner.read)
        with cpu_dispatch.shareable(request.device, bound=False):
            model: nn.Module = inner.load_model(request.vllm_config, request.model_config, request.prefix)
        loaded = time.perf_counter()
        try:
            checkpoint.unchanged()
            late = self._rehearsed(request, model)
            if inner.left_behind:
                raise UnsupportedError(
                    f"loading changes tensors that no module names: {', '.join(inner.left_behind[:5])}"
                )
            if inner.read != hashed:
                raise CheckpointError(f"vLLM read files that were not hashed: {sorted(map(str, inner.read - hashed))}")
            publication = Publication(
                key=key,
                name=request.name,
                engine=f"vllm {compat.version()}",
                device=store_device(request.device),
                state={
                    "attributes": state.changes(inner.before, state.plain_state(model)),
                    "kernels": rehearsal.fingerprints(model, late),
                },
            )
            with progress("wooly: publishing", 0) as copied:
                manifest, blobs, bound = publish(
                    session,
                    publication,
                    model,
                    backend,
                    min_bytes=self.options.share_min_bytes,
                    progress=copied,
                )
        except WoolyError as error:
            return self._stay_private(session, request, model, error)
        save_in_background(key, self.options.runtime_dir)
        bound = self._keep(session, request, manifest, model, bound, blobs)
        logger.info(
            "wooly: published %s in %.3f s (stock load %.3f s, %d tensors, %.1f MiB shared, %.1f MiB private, key %s)",
            request.name,
            time.perf_counter() - began,
            loaded - began,
            bound.tensors,
            bound.mapped_bytes / 2**20,
            bound.private_bytes / 2**20,
            key[:12],
        )
        model.eval()
        return model

    def _stay_private(self, session: Session, request: Request, model: nn.Module, error: WoolyError) -> nn.Module:
        """The model is loaded, but could not be published: use it as it is, where that is allowed."""
        if not self.options.falls_back:
            raise error
        self._tell_fallback(session, request, error)
        if request.sleeps:
            logger.warning("wooly: the weights of %s stay in GPU memory while this engine sleeps", request.name)
        model.eval()
        return model

    def _load_stock(self, request: Request, session: Session | None, error: WoolyError) -> nn.Module:
        self._tell_fallback(session, request, error)
        loaded = self._inner().load_model(request.vllm_config, request.model_config, request.prefix)
        assert isinstance(loaded, nn.Module)  # noqa: S101 - vLLM's contract
        return loaded

    def _tell_fallback(self, session: Session | None, request: Request, error: WoolyError) -> None:
        """Say once, and count, that a model is this process's own."""
        logger.warning(
            "wooly: %s is loaded the stock way, and not shared: %s [%s]. "
            "Pass --model-loader-extra-config '{\"fallback\": false}' to make this an error.",
            request.name,
            error,
            error.code,
        )
        report_fallback(session, request.name, error, logger)

    def _keep(
        self,
        session: Session,
        request: Request,
        manifest: manifests.Manifest,
        model: nn.Module,
        meant: Bound,
        blobs: MappedBlobs,
    ) -> Bound:
        """Report what is shared, as it turned out. The connection is the lease: it ends when the model does."""
        found = measure(model, blobs)
        lost = meant.mapped_bytes - found.mapped_bytes
        if lost > meant.mapped_bytes * LOST_TOLERATED:
            logger.warning(
                "wooly: %s: %.1f MiB that could be shared became private after binding", request.name, lost / 2**20
            )
        sleeper = None
        if request.sleeps:
            sleeper = Sleeper(
                session,
                manifest,
                blobs.places,
                blobs.segments,
                blobs.mappings(),
                backend_of(request.device),
                private_bytes=found.private_bytes,
                timeout_s=self.options.timeout_s,
            )
        sleeping.share(model, sleeper)
        if request.device.type == "cuda":
            refused_writes.install()
        session.report(manifest.key, found.private_bytes + blobs.private_bytes())
        keep(session, model)
        return dataclasses.replace(found, tensors=meant.tensors)

    def _inner(self) -> InnerLoader:
        return InnerLoader(
            dataclasses.replace(
                self.load_config,
                load_format=self.options.inner_load_format,
                model_loader_extra_config=self._inner_extra,
            )
        )


class AutoLoader(WoolyLoader):
    """The load format ``auto`` where ``WOOLYAI_WEIGHTS_DEDUP`` is on: for command lines that cannot be changed.

    What ``--model-loader-extra-config`` says to vLLM's own loader goes on to it; it may hold keys of ours too.
    """

    def __init__(self, load_config: Any) -> None:
        """Read the options. Raises :class:`ConfigError` for one of ours, ``ValueError`` (vLLM's) for another."""
        super().__init__(load_config)
        self._inner()  # which reads its own

    @staticmethod
    def _read(extra: Any) -> tuple[Options, dict[str, Any]]:
        return split(extra) if isinstance(extra, Mapping) else (Options(), extra)


def _end(session: Session | None) -> None:
    """End the connection, and with it whatever was granted to it."""
    if session is not None:
        session.close()
