"""An unsupported transformers is refused when `wooly_hf` is imported, and stays unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from shared_store.runtime import versions as supported

BROKEN = {
    "gone": ("del P._load_pretrained_model", "PreTrainedModel._load_pretrained_model is gone"),
    "of another kind": (
        "P._load_pretrained_model = lambda *_: None",
        "PreTrainedModel._load_pretrained_model is gone, or another kind of method",
    ),
    "other arguments": (
        "P._load_pretrained_model = staticmethod(lambda model, files: None)",
        "_load_pretrained_model takes other arguments",
    ),
    "finalizing": ("del P._finalize_model_loading", "PreTrainedModel._finalize_model_loading is gone"),
    "other results": (
        """
import dataclasses, transformers.utils.loading_report as report
report.LoadStateDictInfo = dataclasses.make_dataclass('Info', ['missing_keys'])
""",
        "LoadStateDictInfo has other fields",
    ),
    "other settings": (
        "import dataclasses; m.LoadStateDictConfig = dataclasses.make_dataclass('C', ['device_map'])",
        "LoadStateDictConfig has no device_mesh, dtype",
    ),
    "moved module": (
        "import transformers.core_model_loading as c; del c.WeightTransform",
        "cannot import name 'WeightTransform'",
    ),
    "too old": ("import transformers; transformers.__version__ = '5.15.1'", "transformers 5.15.1 is too old for wooly"),
}

NEWER = "import transformers; transformers.__version__ = '5.99.0'"

PROGRAM = """
import json, os, sys
import transformers.modeling_utils as m
P = m.PreTrainedModel
for name, change in json.loads(sys.argv[1]).items():
    if os.fork():
        assert os.wait()[1] == 0
        continue
    exec(change)
    before, error = dict(vars(P)), None
    try:
        import wooly_hf
    except Exception as raised:
        error = raised
    print(json.dumps([name, type(error).__name__, str(error), dict(vars(P)) == before]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def answers():
    """Return the outcome of importing `wooly_hf` after each change, each in its own process."""
    changes = {name: code for name, (code, _) in BROKEN.items()} | {"none": "", "newer": NEWER}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(changes)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("change", BROKEN)
def test_refused(answers, change):
    """A typed error says what differs and which versions to install; nothing was replaced."""
    kind, text, untouched = answers[change]
    assert kind == "ConfigError"
    assert BROKEN[change][1] in text
    assert f"install {supported.named('transformers')}" in text
    assert untouched


@pytest.mark.parametrize("change", ["none", "newer"])
def test_accepted(answers, change):
    """The installed version, and a later one with the same hooks."""
    kind, _, untouched = answers[change]
    assert kind == "NoneType"
    assert not untouched
