"""The opt-in distribution: processes that do not import wooly share weights, and none breaks."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ACTIVATION = Path(__file__).resolve().parents[2] / "deploy" / "activation"


@pytest.fixture
def installed(tmp_path):
    """Return a folder with the distribution, in the layout of an installer."""
    project = tomllib.loads((ACTIVATION / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "site"
    info = folder / f"wooly_activate-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["torch.backends"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{lines}")
    (folder / "wooly_activate.py").write_text((ACTIVATION / "wooly_activate.py").read_text())
    return folder


def python(code, store, folder, *arguments, **environment):
    """Run a program that finds the distribution; return its stdout and stderr."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "WOOLY_RUNTIME_DIR": str(store.directory),
            "WOOLY_AUTOSTART": "0",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


LOAD = """
import sys
from transformers import AutoModelForCausalLM
for device_map in {maps}:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=device_map)
    from shared_store.torch.mapping_registry import mapping_of
    print(mapping_of(model.model.embed_tokens.weight) is not None)
"""


@pytest.mark.parametrize(
    ("variable", "maps", "shared"),
    [
        ("1", [None, "cpu", {"": "cpu"}, "wooly:cpu"], [True, True, True, True]),
        ("0", [None, "cpu", "wooly:cpu"], [False, False, True]),
    ],
)
def test_a_program_that_does_not_import_wooly(store, installed, checkpoint, variable, maps, shared):
    """The device map works. With the variable on, loading onto one device shares without it; off, all is stock."""
    out, _ = python(LOAD.format(maps=maps), store, installed, checkpoint("llama"), WOOLYAI_WEIGHTS_DEDUP=variable)
    assert out.split() == [str(one) for one in shared]


@pytest.mark.parametrize("first", ["torch", "transformers", "transformers.modeling_utils"])
def test_any_order_of_imports(store, installed, first):
    """Wooly is imported with transformers' models, and not with torch alone."""
    code = (
        f"import {first}, sys; assert 'wooly_hf' not in sys.modules or 'transformers.modeling_utils' in sys.modules; "
        "from transformers import LlamaForCausalLM; print('wooly_hf' in sys.modules)"
    )
    assert python(code, store, installed)[0] == "True"


def test_without_the_distribution_nothing_happens(store, tmp_path):
    """Control of the test above."""
    code = "from transformers import LlamaForCausalLM; import sys; print('wooly_hf' in sys.modules)"
    assert python(code, store, tmp_path)[0] == "False"


def test_an_unsupported_transformers_warns_and_works(store, installed, checkpoint):
    """With an unsupported transformers, a warning has the reason, and the program runs without wooly."""
    code = LOAD.format(maps=[None]).replace(
        "import sys\n", "import sys, transformers\ntransformers.__version__ = '4.57.6'\n"
    )
    out, err = python(code, store, installed, checkpoint("llama"), WOOLYAI_WEIGHTS_DEDUP="1")
    assert out == "False"
    assert "weights are not shared in this process: ConfigError: transformers 4.57.6 is too old" in err


def test_a_broken_installation_does_not_break_torch(store, installed):
    """With wooly missing or broken, `import torch` works, and a warning has the reason."""
    (installed / "shared_store").mkdir()
    (installed / "shared_store" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    out, err = python("import torch; print(torch.ones(2).sum().item())", store, installed)
    assert out == "2.0"
    assert "weights are not shared in this process: RuntimeError: broken" in err
