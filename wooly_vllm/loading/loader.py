"""The model loaders behind ``--load-format wooly``, and ``auto`` under ``WOOLYAI_WEIGHTS_DEDUP``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from shared_store.torch.devices import store_device
from shared_store.torch.fallback import Fallback
from shared_store.torch.load import Settings, load
from shared_store.torch.opening import key_of
from wooly_vllm import compat
from wooly_vllm.loading.inner_loader import InnerLoader
from wooly_vllm.loading.steps import Request, VllmSteps
from wooly_vllm.memory import accounting
from wooly_vllm.options import Options, parse, split
from wooly_vllm.residency import shared_models
from wooly_vllm.sharing_loader import SharingLoader

BaseModelLoader: Any = compat.find("vllm.model_executor.model_loader.base_loader", "BaseModelLoader")[0]

_ADVICE = "Pass --model-loader-extra-config '{\"fallback\": false}' to make this an error."


class WoolyLoader(BaseModelLoader, SharingLoader):  # type: ignore[misc]  # vLLM is not typed for us
    """Loads a model once on each node, and maps it in every other process."""

    def __init__(self, load_config: Any) -> None:
        """Read the options. Raises :class:`ConfigError` for an invalid one."""
        compat.warn_of_version()
        super().__init__(load_config)
        self.options, self._inner_extra = self._read(load_config.model_loader_extra_config)

    @staticmethod
    def _read(extra: Any) -> tuple[Options, dict[str, Any]]:
        """Split an extra config into our options and those of vLLM's loader."""
        return parse(extra), {}

    def download_model(self, model_config: Any) -> None:
        """Download the checkpoint, as the inner load format does."""
        self._inner().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load weights into a model in place.

        Raises:
            UnsupportedError: the model's weights are shared.
        """
        shared_models.refuse_writes([model])
        self._inner().load_weights(model, model_config)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
        """Return the checkpoint's tensors, for a reload in place. Raises as :meth:`load_weights` does."""
        shared_models.refuse_writes([model])
        return self._inner().get_all_weights(model_config, model)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Load a model: attach to it, publish it, or fall back.

        Raises:
            WoolyError: the model cannot be shared, and ``fallback`` is off.
        """
        steps = VllmSteps(self._request(vllm_config, model_config, prefix), self._inner)
        return load(steps, self._settings(store_device(compat.device_of(vllm_config)))).eval()

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Return the shared bytes that vLLM counts as this engine's before it loads (vLLM 0.32 and later)."""
        return accounting.charged_bytes(vllm_config)

    def resident_bytes(self, vllm_config: Any, model_config: Any, *, in_use: bool = False) -> int:
        """Return the bytes of a committed model on the engine's device; 0 if the store does not have it.

        Args:
            vllm_config: vLLM's.
            model_config: of the model.
            in_use: only what stays there whatever the store needs memory for: of a model with readers, or pinned.

        Raises:
            WoolyError: the store or the checkpoint cannot be read.
        """
        request = self._request(vllm_config, model_config)
        request.check_supported()
        settings = self._settings()
        with settings.connect(request.name) as session:
            device = store_device(request.device)
            # Only a model of this engine and version has a key of it. Without one, no key is needed, and the checkpoint
            # is hashed beside the load instead of here.
            committed = {
                model.key: model.resident_bytes if in_use else model.bytes
                for model in session.status().models
                if (model.state, model.device, model.engine) == ("committed", device, settings.named)
                and (not in_use or model.readers or model.pinned)
            }
            if not committed:
                return 0
            identity = request.identify(self._inner())
            with key_of(identity, session, self.options.timeout_s) as key:
                return committed.get(key, 0)

    def checkpoint_bytes(self, model_config: Any) -> int:
        """Return the bytes of the files that a model will be loaded from.

        Raises:
            WoolyError: they cannot be found.
        """
        files = compat.weight_files(self._inner(), model_config, compat.model_class(model_config))
        return sum(path.stat().st_size for _, path in files)

    def _request(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Request:
        return Request(vllm_config, model_config, self.load_config, self.options, prefix)

    def _settings(self, *devices: str) -> Settings:
        options = self.options
        return Settings(
            engine="vllm",
            version=compat.version(),
            fallback=Fallback(options.falls_back, _ADVICE, compat.logger()),
            runtime_dir=options.runtime_dir,
            timeout_s=options.timeout_s,
            publish=options.mode != "load",
            restore_from=options.restore_from,
            min_bytes=options.share_min_bytes,
            devices=devices,
            workload=options.workload_settings,
        )

    def _inner(self) -> InnerLoader:
        return InnerLoader(
            dataclasses.replace(
                self.load_config,
                load_format=self.options.inner_load_format,
                model_loader_extra_config=self._inner_extra,
            )
        )


class AutoLoader(WoolyLoader):
    """The load format ``auto`` under ``WOOLYAI_WEIGHTS_DEDUP``, for command lines that cannot be changed.

    ``--model-loader-extra-config`` may mix keys of vLLM's own loader, which are passed on, with wooly's.
    """

    def __init__(self, load_config: Any) -> None:
        """Read the options. Raises :class:`ConfigError` for one of wooly's, ``ValueError`` for one of vLLM's."""
        super().__init__(load_config)
        self._inner()  # vLLM's loader checks its own keys

    @staticmethod
    def _read(extra: Any) -> tuple[Options, dict[str, Any]]:
        return split(extra) if isinstance(extra, Mapping) else (Options(), extra)
