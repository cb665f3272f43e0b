"""What the parity matrix says of answers, and that its page says what its results say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import parity
import parity_rows
import pytest
import quantized

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [[*range(10)], [*range(10, 20)]]
OTHERS = [[*range(10)], [*range(11, 21)]]
LEASE = {"role": "reader", "mapped_bytes": 990, "private_bytes": 10}


def _page(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "parity.py"), "--markdown", *options]
    # A script that imports its neighbours: its own folder has to be on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_committed_page_is_of_the_committed_results():
    """Whoever adds results and not the page learns it here."""
    checked = _page("--check")
    assert checked.returncode == 0, checked.stderr


def test_a_changed_result_makes_the_page_stale_and_writing_it_makes_it_whole(tmp_path):
    """The check fails after one row has come out otherwise, and passes once the page is written again."""
    results, page = tmp_path / "parity.json", tmp_path / "parity.md"
    shutil.copyfile(ROOT / "benchmarks" / "results" / "parity.json", results)
    where = ("--output", str(results), "--page", str(page))
    assert _page(*where).returncode == 0
    assert _page(*where, "--check").returncode == 0
    changed = json.loads(results.read_text())
    changed["raw"][0] |= {"status": "differs", "reason": "answer 1 of the reader | is not stock's"}
    results.write_text(json.dumps(changed))
    stale = _page(*where, "--check")
    assert stale.returncode == 1
    assert "parity.py --markdown" in stale.stderr
    assert _page(*where).returncode == 0
    assert "| differs | answer 1 of the reader \\| is not stock's |" in page.read_text()


def _answers(publisher=TOKENS, reader=TOKENS, *, again=TOKENS, refused=(), lease=LEASE):
    return {
        "stock": [{"answer": TOKENS}, {"answer": again}],
        "publisher": [{"answer": publisher, "refused": list(refused), **lease}, {"answer": publisher}],
        "reader": [{"answer": reader, "refused": list(refused), **lease}, {"answer": reader}],
    }


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        (_answers(), "equal", ""),
        (_answers(refused=["because [unsupported]"]), "refused", "because [unsupported]"),
        (_answers(reader=OTHERS), "differs", "answer 1 of the reader is not stock's"),
        (_answers(publisher=OTHERS, refused=["because [x]"]), "differs", "not shared: because [x]"),
        (_answers(again=OTHERS), "differs", "stock vLLM does not answer twice alike either"),
        (_answers(lease={"role": None}), "failed", "the reader maps nothing"),
        (_answers(lease=LEASE | {"mapped_bytes": 0}), "failed", "the reader maps nothing"),
    ],
)
def test_a_row_is_what_its_answers_say(answers, status, words):
    """An answer that is not stock's is never hidden: neither by a refusal nor by a second answer."""
    outcome = parity.judge(answers, embeds=False)
    assert outcome.status == status
    assert words in outcome.reason
    assert outcome.shared_fraction == (0.99 if status == "equal" else 0)


def test_answers_that_hardly_vary_prove_nothing():
    """Three engines that repeat one token are not equal, they are failed; embeddings are judged by their bits alone."""
    same = {role: [{**each, "answer": [[7] * 24]} for each in both] for role, both in _answers().items()}
    assert parity.judge(same, embeds=False).status == "failed"
    assert parity.judge(same, embeds=True).status == "equal"


def test_every_family_and_every_method_has_rows():
    """A random model or a file format that is added and not compared is noticed; GPU rows use graphs unless twice."""
    rows = parity_rows.ROWS.values()
    assert {row.model for row in rows if row.gpu} == {row.model for row in rows if row.cpu} == set(families.FAMILIES)
    assert set(quantized.METHODS) < {row.quantization for row in rows}
    assert {row.dtype for row in rows if row.model == "llama" and row.graphs} == {"bfloat16", "float16", "float32"}
    assert all(row.graphs or row.cpu for row in rows)
