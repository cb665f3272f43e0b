"""What wooly needs of the installed vLLM is there; where it is not, an error says so and what to do."""

from __future__ import annotations

import ast
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import PRELOADED
from support.preloaded import finish

from shared_store.base.errors import ConfigError
from shared_store.runtime import versions as supported

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def compat() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn of what torch will drop
        from wooly_vllm import compat
        from wooly_vllm.loading import loader

    assert loader.WoolyLoader is not None
    return compat


def _hooks(folder: Path) -> Iterator[tuple[str, ...]]:
    """Module and names of every ``find`` and ``replace_function`` in the plugin's source, where it writes them out."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        known = {node.targets[0].id: node.value.value for node in assigned if isinstance(node.targets[0], ast.Name)}  # type: ignore[attr-defined]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", getattr(call.func, "id", "")) in {"find", "replace_function"}:
                given = [
                    one.value if isinstance(one, ast.Constant) else known.get(ast.unparse(one)) for one in call.args
                ]
                if given[0] is not None:
                    yield tuple(name for name in given if name is not None)


def test_every_hook_is_where_it_is_looked_for(compat: Any) -> None:
    """Those of GPUs too, which nothing on a CPU calls."""
    hooks = set(_hooks(Path(compat.__file__).parent))
    assert ("vllm.v1.worker.gpu_worker", "request_memory") in hooks
    assert len(hooks) > 10
    if not compat.packs_small_weights():
        hooks -= {("vllm._custom_ops", "weight_packed_linear_cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, *names in sorted(hooks):
            compat.find(module, *names)


@pytest.fixture
def advice(compat: Any) -> str:
    """What an error about a hook that is missing says besides."""
    return rf"this vLLM \({compat.version()}\).*install '{supported.range_of('vllm')}', which wooly supports"


def test_a_name_that_is_gone(compat: Any, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import model_loader

    monkeypatch.delattr(model_loader, "register_model_loader")
    with pytest.raises(ConfigError, match=advice) as raised:
        compat.register_loader("wooly", object)
    assert "vllm.model_executor.model_loader.register_model_loader" in str(raised.value)


def test_a_module_that_is_gone(compat: Any, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.rotary_embedding", None)
    with pytest.raises(ConfigError, match=advice) as raised, compat.building(None, None):
        pass
    assert "vllm.model_executor.layers.rotary_embedding._ROPE_DICT" in str(raised.value)


def test_attributes_that_are_gone(compat: Any, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of configurations and of the default loader are looked for when a model is loaded."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    with (
        pytest.raises(ConfigError, match=advice),
        compat.building(SimpleNamespace(compilation_config=SimpleNamespace()), None),
    ):
        pass
    monkeypatch.delattr(DefaultModelLoader, "_prepare_weights")
    config = SimpleNamespace(model="some/where", revision=None)
    with pytest.raises(ConfigError, match=advice):
        compat.weight_files(object.__new__(DefaultModelLoader), config, object)


def test_small_weights_stay_plain_where_their_kernel_takes_other_arguments(
    compat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before 0.29, on a CPU whose weights would be packed."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    from wooly_vllm import cpu_dispatch

    monkeypatch.delattr(_custom_ops, "weight_packed_linear_cpu", raising=False)
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: True)
    assert not compat.packs_small_weights()
    layer = torch.nn.Linear(32, 16, dtype=torch.bfloat16)
    cpu_dispatch._prepare(layer, remove_weight=True, stock=lambda *_: pytest.fail("packed by vLLM"))
    assert layer.cpu_linear is torch.nn.functional.linear
    assert layer.weight.shape == (16, 32)


def test_where_the_loader_cannot_be_made_its_format_is_refused_and_others_are_not(tmp_path: Path) -> None:
    """A process of vLLM's own lacks a class that the loader needs: whoever asks for wooly is told what to do."""
    program = tmp_path / "program.py"
    program.write_text(
        "from vllm.model_executor.model_loader import base_loader\n"
        "from vllm.plugins import load_general_plugins\n"
        "del base_loader.BaseModelLoader\n"
        "load_general_plugins()\n"
        "from vllm.config import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "print(type(get_model_loader(LoadConfig())).__name__)\n"
        "get_model_loader(LoadConfig(load_format='wooly'))\n"
    )
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = PRELOADED.start(str(program), environment={**os.environ, "WOOLYAI_WEIGHTS_DEDUP": "1"}, stderr=stderr)
    code, printed = finish(process, 200)
    told = errors.read_text()
    assert code == 1, printed + told
    assert printed.splitlines()[-1] == "DefaultModelLoader"
    said = "vllm.model_executor.model_loader.base_loader.BaseModelLoader where wooly looks for it"
    assert "wooly: cannot share weights, --load-format wooly is refused: this vLLM" in printed + told
    last = told.strip().splitlines()[-1]
    assert last.startswith("shared_store.base.errors.ConfigError: ")
    assert said in last
    assert f"install '{supported.range_of('vllm')}', which wooly supports, or a newer wooly" in last


@pytest.mark.parametrize(("version", "warned"), [("0.25.1", 1), ("0.26.0", 0), ("0.33.1+cu130", 0), ("0.34.0", 1)])
def test_a_version_out_of_the_range_is_said_once(
    compat: Any, version: str, warned: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever makes loaders hears it at the first; nothing is refused."""
    import vllm
    from vllm.config import LoadConfig

    from wooly_vllm.loading.loader import WoolyLoader

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(compat, "logger", lambda: logging.getLogger("wooly-test"))
    compat.warn_of_version.cache_clear()
    try:
        for _ in range(2):
            WoolyLoader(LoadConfig(load_format="wooly"))
    finally:
        compat.warn_of_version.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name == "wooly-test"]
    assert len(said) == warned
    assert all(f"vLLM {version} is not a version that wooly supports" in text for text in said)
    assert all(f"install '{supported.range_of('vllm')}', or a newer wooly" in text for text in said)
