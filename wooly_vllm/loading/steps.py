"""vLLM's steps of loading a shared model; :func:`shared_store.torch.load.load` calls them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import BindingError, CheckpointError, UnsupportedError, WoolyError
from shared_store.base.manifest import Manifest
from shared_store.client.identify import Checkpoint
from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.bind import Binder, Bound, measure
from shared_store.torch.devices import backend_of
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.steps import Description, Identity, Loaded, Shared
from shared_store.torch.tensors import named_tensors
from wooly_vllm import compat, cpu_dispatch
from wooly_vllm.loading import identity, methods, rehearsal, state
from wooly_vllm.loading.inner_loader import InnerLoader
from wooly_vllm.memory import refused_writes
from wooly_vllm.options import Options
from wooly_vllm.residency import activity, phase, shared_models, sleep, worker

LOST_TOLERATED = 0.01
"""Fraction of the mapped bytes that may become private after binding without a warning."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of ``load_model``, and the loader's settings."""

    vllm_config: Any
    model_config: Any
    load_config: Any
    options: Options
    prefix: str = ""

    @property
    def name(self) -> str:
        """The served name of the model, or its path."""
        return str(self.model_config.served_model_name or self.model_config.model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return compat.device_of(self.vllm_config)

    def check_supported(self) -> None:
        """Raise :class:`UnsupportedError` for settings that are known not to work with shared weights."""
        identity.check_supported(self.vllm_config, self.model_config, self.load_config, unproven=self.options.unproven)

    def identify(self, inner: InnerLoader) -> Identity:
        """Return the parts of the weight key; ``inner`` finds the checkpoint's files."""
        files = compat.weight_files(inner, self.model_config, compat.model_class(self.model_config))
        checkpoint = Checkpoint(files)
        facts = identity.facts(self.vllm_config, self.model_config, self.options.inner_load_format)
        return Identity(self.device, checkpoint, facts)


class VllmSteps:
    """The steps of one call of ``load_model``."""

    def __init__(self, request: Request, make_inner: Callable[[], InnerLoader]) -> None:
        """Take a request. ``make_inner``: makes the loader that reads the checkpoint."""
        self._request = request
        self._make_inner = make_inner
        self._hashed: set[Path] = set()
        self._may_sleep = False

    @functools.cached_property
    def _inner(self) -> InnerLoader:
        return self._make_inner()

    @property
    def name(self) -> str:
        """The model's name."""
        return self._request.name

    @property
    def loads_ahead(self) -> bool:
        """True: a model of its own is built for each load."""
        return True

    def prepare(self) -> None:
        """Hook the workers' sleep, and check the engine's settings and device."""
        sleep.install_in_workers()
        worker.install()
        self._request.check_supported()
        backend_of(self._request.device)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Allocate outside of the memory pool that vLLM's sleep mode offloads."""
        with compat.outside_sleep_pool() as may_sleep:
            self._may_sleep = may_sleep
            yield

    def identify(self) -> Identity:
        """Find the checkpoint's files and collect the facts of the weight key."""
        found = self._request.identify(self._inner)
        self._hashed = set(self._inner.read)
        return found

    def attach(self, manifest: Manifest, mapped: MappedModel) -> tuple[Loaded[nn.Module], Bound]:
        """Build the model of placeholders, and bind it."""
        try:
            model, bound = self._build(manifest, mapped)
        except WoolyError:
            raise
        except Exception as error:  # a constructor may raise anything; stock loading is still possible
            raise BindingError(
                f"the model could not be built of placeholders: {type(error).__name__}: {error}"
            ) from error
        return Loaded(model, model), bound

    def _build(self, manifest: Manifest, mapped: MappedModel) -> tuple[nn.Module, Bound]:
        request, min_bytes = self._request, self._request.options.share_min_bytes
        with compat.building(request.vllm_config, request.model_config):
            with request.device, Placeholders(min_bytes) as placeholders:
                model = compat.initialize(request.vllm_config, request.model_config, request.prefix)
            late = self._rehearsed(model)
            attributes, kernels = manifest.state["attributes"], manifest.state["kernels"]
            binder = Binder(model, manifest, mapped, placeholders, min_bytes=min_bytes)
            binder.bind(late.values(), completes_itself=compat.completes_itself)
            state.restore(model, attributes, but=late.values())
            with cpu_dispatch.shareable(request.device, bound=True):
                rehearsal.rehearse(binder, late.values(), request.device)
                done = (*late.values(), *methods.finished_layers(model))
                compat.post_process_bound(model, request.model_config, request.device, done)
            bound = binder.finish()
            state.restore(model, attributes)  # post-processing may have reset some to defaults
            rehearsal.check(model, late, kernels)
        return model, bound

    def _rehearsed(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to rehearse, by path. Raises :class:`UnsupportedError` for an unproven one."""
        layers = methods.rehearsed_layers(model)
        if not self._request.options.unproven:
            methods.check_proven(layers, self._request.device)
        return layers

    def load_to_publish(self) -> Loaded[nn.Module]:
        """Load the checkpoint with vLLM's loader."""
        request = self._request
        self._registers = compat.Registers(request.vllm_config)
        with cpu_dispatch.shareable(request.device, bound=False), _examining_new_objects():
            model: nn.Module = self._inner.load_model(request.vllm_config, request.model_config, request.prefix)
        return Loaded(model, model)

    def discard(self, loaded: Loaded[nn.Module]) -> None:
        """Drop the model from vLLM's registers, and free its weights: cycles would keep it until they are collected."""
        self._registers.restore()
        for named in named_tensors(loaded.model):
            named.tensor.data = torch.empty(0, dtype=named.tensor.dtype, device=named.tensor.device)

    def describe(self, loaded: Loaded[nn.Module]) -> Description:
        """Collect the state that loading left on modules.

        Raises:
            UnsupportedError: a layer is unproven, or loading changed tensors that no manifest can name.
            CheckpointError: vLLM read files that are not part of the key.
        """
        inner, late = self._inner, self._rehearsed(loaded.model)
        if inner.left_behind:
            raise UnsupportedError(f"loading changes tensors that no module names: {', '.join(inner.left_behind[:5])}")
        if inner.read != self._hashed:
            unhashed = sorted(map(str, inner.read - self._hashed))
            raise CheckpointError(f"vLLM read files that were not hashed: {unhashed}")
        return Description(
            {
                "attributes": state.changes(inner.before, state.plain_state(loaded.model)),
                "kernels": rehearsal.fingerprints(loaded.model, late),
            }
        )

    def bound(self, shared: Shared[nn.Module]) -> Bound:
        """Measure what is shared, and guard the model against writes and vLLM's own sleep."""
        model, meant = shared.loaded.model, shared.bound
        found = measure(model, shared.mapped)
        lost = meant.mapped_bytes - found.mapped_bytes
        if lost > meant.mapped_bytes * LOST_TOLERATED:
            compat.logger().warning(
                "wooly: %s: %.1f MiB that could be shared became private after binding", self.name, lost / 2**20
            )
        activity.may_report_through(shared.session)
        phase.use(shared.session)
        shared_models.add(model, self._sleeper(shared, found))
        if self._request.device.type == "cuda":
            refused_writes.install()
        return dataclasses.replace(found, tensors=meant.tensors)

    def _sleeper(self, shared: Shared[nn.Module], found: Bound) -> Sleeper:
        return Sleeper(
            shared.session,
            shared.manifest,
            shared.mapped.places,
            shared.mapped.segments,
            shared.mapped.mappings(),
            backend_of(self._request.device),
            private_bytes=found.private_bytes,
            timeout_s=self._request.options.timeout_s,
        )

    def left_private(self, loaded: Loaded[nn.Module]) -> None:  # noqa: ARG002 - the protocol's
        """Warn that sleep does not free weights that were loaded outside of vLLM's pool."""
        if self._may_sleep:
            compat.logger().warning("wooly: the weights of %s stay in GPU memory while this engine sleeps", self.name)

    def load_stock(self) -> nn.Module:
        """Load with a new loader of vLLM's."""
        request = self._request
        loaded = self._make_inner().load_model(request.vllm_config, request.model_config, request.prefix)
        assert isinstance(loaded, nn.Module)  # noqa: S101 - vLLM's contract
        return loaded


@contextlib.contextmanager
def _examining_new_objects() -> Iterator[None]:
    """Leave objects that exist already out of the garbage collections in this context.

    vLLM collects twice while it loads, to free what the load left. With everything that an engine has imported, a
    million objects, these collections take half of a small model's load.
    """
    if gc.get_freeze_count():  # the process froze objects itself, which must stay frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
