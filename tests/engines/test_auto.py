"""``WOOLYAI_WEIGHTS_DEDUP``: engines without an option of wooly's share weights, and work as before."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import status_of

from shared_store.base.errors import ConfigError, UnsupportedError
from wooly_vllm.options import Options, split

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

FORMATS = ("wooly", "auto", "hf", "safetensors")
MULTITHREAD = {"enable_multithread_load": True, "num_threads": 2}


def test_an_auto_engine_shares_with_a_wooly_engine(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """The first engine has only an option of vLLM's own loader, which is applied; the second attaches to its model."""
    path = checkpoint("llama")
    fixed = engine(path, extra=MULTITHREAD, lease=True, hold=True, environment={"WOOLYAI_WEIGHTS_DEDUP": "true"})
    published = fixed.wait("answered")
    asking = engine(path, load_format="wooly", extra={"fallback": False}, hold=True)
    attached = asking.wait("answered")
    assert any("Multi-thread loading shards" in line for line in fixed.log)
    status = status_of(runtime_dir)
    assert (len(status.models), status.models[0].readers) == (1, 2)
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (1, 2, 0)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert published["mapped_bytes"] == attached["mapped_bytes"] > 0.99 * stored
    assert published["private_bytes"] < published["mapped_bytes"] / 1000
    assert published["tokens"] == attached["tokens"]


def test_options_are_divided_between_wooly_and_vllm() -> None:
    """Wooly's options are parsed and checked; all others are passed to vLLM's loader."""
    assert split(MULTITHREAD | {"fallback": False}) == (Options(fallback=False), MULTITHREAD)
    with pytest.raises(ConfigError, match="timeout_s"):
        split({"timeout_s": -1})


@pytest.fixture(scope="module")
def loading() -> Any:
    """Return the loaders of the plugin and of vLLM, whose own imports warn about deprecations in torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import LoadConfig
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        from wooly_vllm.loading import loader

        return SimpleNamespace(LoadConfig=LoadConfig, DefaultModelLoader=DefaultModelLoader, ours=loader)


@pytest.mark.parametrize(("value", "ours"), [(None, False), ("false", False), ("true", True)])
def test_the_variable_makes_auto_share(
    loading: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, ours: bool
) -> None:
    """Without the variable ``auto`` is vLLM's own loader; formats named explicitly always are."""
    from vllm.model_executor import model_loader

    import wooly_vllm

    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER))
    monkeypatch.delenv("WOOLYAI_WEIGHTS_DEDUP", raising=False)
    if value is not None:
        monkeypatch.setenv("WOOLYAI_WEIGHTS_DEDUP", value)
    wooly_vllm.register()
    made = {name: type(model_loader.get_model_loader(loading.LoadConfig(load_format=name))) for name in FORMATS}
    assert made["wooly"] is loading.ours.WoolyLoader
    assert made["auto"] is (loading.ours.AutoLoader if ours else loading.DefaultModelLoader)
    assert made["hf"] is made["safetensors"] is loading.DefaultModelLoader


def test_an_unknown_option_raises_vllms_error(loading: Any) -> None:
    config = loading.LoadConfig(load_format="auto", model_loader_extra_config={"enable_multithred_load": True})
    with pytest.raises(ValueError, match="enable_multithred_load") as stock:
        loading.DefaultModelLoader(config)
    with pytest.raises(ValueError, match="enable_multithred_load") as shared:
        loading.ours.AutoLoader(config)
    assert str(shared.value) == str(stock.value)


def test_only_shared_weights_cannot_be_reloaded(loading: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights loaded the stock way are reloaded the stock way; shared ones are refused, with the next step."""
    import torch

    from wooly_vllm.residency import shared_models

    reached = []
    monkeypatch.setattr(loading.DefaultModelLoader, "load_weights", lambda *arguments: reached.append(arguments[1]))
    loader = loading.ours.AutoLoader(loading.LoadConfig())
    private, shared = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    shared_models.add(shared)
    loader.load_weights(private, None)
    with pytest.raises(UnsupportedError, match="without WOOLYAI_WEIGHTS_DEDUP"):
        loader.load_weights(shared, None)
    with pytest.raises(UnsupportedError, match="without WOOLYAI_WEIGHTS_DEDUP"):
        loader.get_all_weights(None, shared)
    assert reached == [private]
