"""Wrappers of the functions with which transformers loads weights. They note which calls ask for shared weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shared_store.base import envs
from shared_store.base.errors import ConfigError, UnsupportedError, WoolyError
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.torch.load import load
from wooly_hf import compat
from wooly_hf.device_map import parse
from wooly_hf.steps import NoMemoryError, Result, TransformersSteps, publishing, settings
from wooly_hf.workload import arguments, process

log = logging.getLogger(__name__)


@dataclass
class _Request:
    """A call of ``from_pretrained`` that shares weights. Only the first load in it is the model's own.

    Attributes:
        asked: the device map asks for it. Otherwise the environment does, for models that go onto one device.
        taken: the model's load has begun.
        settings: of the workload, from the arguments.
        loading: contexts that last until the call ends.
    """

    asked: bool
    taken: bool = False
    settings: WorkloadSettings = field(default_factory=WorkloadSettings)
    loading: ExitStack = field(default_factory=ExitStack)

    def fall_back(self, name: str, error: UnsupportedError) -> None:
        """Report a fallback before the load. Raises ``error`` if ``WOOLY_STRICT`` is set."""
        self.taken = True
        chosen = settings()
        session = None
        try:
            session = chosen.connect(name)
        except WoolyError as unreachable:
            log.debug("wooly: no store counts this fallback: %s", unreachable)
        chosen.fallback.report(session, name, error)


_request: ContextVar[_Request | None] = ContextVar("wooly_request", default=None)


def wrap_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``PreTrainedModel.from_pretrained`` (as a plain function) to accept wooly's device maps."""

    @functools.wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wanted, settings = parse(kwargs.get("device_map")), arguments.take_out(kwargs)
        if wanted is not None:
            kwargs["device_map"] = wanted.inner
        asked = wanted is not None
        # None also hides the request of an enclosing model from the load of a submodel.
        request = _Request(asked) if asked or envs.WEIGHTS_DEDUP.get() else None
        if settings is not None:
            if request is None:
                raise ConfigError(f'{", ".join(arguments.NAMES)} are for models with device_map="wooly"')
            request.settings = settings
        if request is not None:
            try:
                compat.check_arguments(kwargs)
            except UnsupportedError as error:
                request.fall_back(_name_of(cls, args, kwargs), error)
        token = _request.set(request)
        with contextlib.nullcontext() if request is None else request.loading:
            try:
                model = stock(cls, *args, **kwargs)
            finally:
                _request.reset(token)
        if request is not None and not request.taken:
            own_way = UnsupportedError(f"{cls.__name__} has its own way to load weights")
            request.fall_back(_name_of(cls, args, kwargs), own_way)
        return model

    return from_pretrained


def _name_of(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the checkpoint that a call of ``from_pretrained`` names, or else the class."""
    return str((args[0] if args else kwargs.get("pretrained_model_name_or_path")) or cls.__name__)


def wrap_distributed(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the loading of distributed checkpoints, which replaces ``_load_pretrained_model``, to fall back."""

    @functools.wraps(stock)
    def load_distributed(model: nn.Module, folder: Any, *args: Any, **kwargs: Any) -> Any:
        request = _request.get()
        if request is not None and not request.taken:
            request.fall_back(str(folder), UnsupportedError("distributed checkpoints are read in parts"))
        return stock(model, folder, *args, **kwargs)

    return load_distributed


def wrap_load(stock: compat.Load) -> compat.Load:
    """Wrap ``PreTrainedModel._load_pretrained_model`` to share the model's weights if the call asks for it."""

    @functools.wraps(stock)
    def load_pretrained(
        model: nn.Module, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Result:
        def load_stock() -> Result:
            return stock(model, state_dict, checkpoint_files, load_config, expected_keys)

        request = _request.get()
        if request is None or request.taken or expected_keys is not None:
            return load_stock()
        request.taken = True  # adapters that are loaded later in the same call stay private
        if not request.asked and not compat.onto_one_device(load_config):
            return load_stock()  # the environment does not ask for sharing here, so there is nothing to report
        steps = TransformersSteps(model, state_dict, checkpoint_files, load_config, load_stock)
        return _load_as_workload(request, steps, load_config)

    return load_pretrained


def _load_as_workload(request: _Request, steps: TransformersSteps, load_config: Any) -> Result:
    """Load a model into the workload of this process, which joins the store first, if it has not."""
    chosen = dataclasses.replace(settings(load_config), workload=request.settings)
    try:
        device = compat.device_of(load_config)
    except UnsupportedError:
        return load(steps, chosen)
    workload = process.joined(Path(steps.name).name, device, request.settings)
    if workload is None:
        return load(steps, chosen)
    request.loading.enter_context(workload.loading())
    if not request.asked and not request.settings.swap:
        workload.refuse('its user did not ask for shared weights; device_map="wooly" or wooly_swap=True would')
    steps.join(workload, device)
    try:
        return load(steps, dataclasses.replace(chosen, member_of=workload.id))
    except NoMemoryError as error:
        raise error.reason from None


def wrap_warmup(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``caching_allocator_warmup`` to skip it for a model that will be published.

    It allocates GPU memory for the whole model in one block. No part of a block can be freed while tensors move to the
    store, so the peak would be two models.
    """

    @functools.wraps(stock)
    def warmup(*args: Any, **kwargs: Any) -> Any:
        return None if publishing.get() else stock(*args, **kwargs)

    return warmup
