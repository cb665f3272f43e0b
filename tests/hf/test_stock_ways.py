"""Models that cannot be shared load as in stock: with one warning and a count, or an error in strict mode."""

from __future__ import annotations

import pytest
from hf.jobs import JobError
from hf.stock_ways import WAYS, as_rank


@pytest.fixture(params=WAYS)
def name(request):
    return request.param


@pytest.fixture
def way(name):
    """Return a way of loading that this machine supports."""
    found = WAYS[name]
    if found.unavailable:
        pytest.skip(found.unavailable)
    return found


@pytest.fixture
def path(way, fresh):
    """Return a checkpoint for it that is new to the store."""
    made = fresh("llama")
    if way.prepare:
        way.prepare(made)
    return made


@pytest.fixture
def together(job, way, name, tmp_path):
    """Return a function that starts the processes that load together, and one that runs code in all of them."""
    tmp_path.chmod(0o700)

    def get(**environment):
        kind = "strict" if environment else "lax"
        jobs = [job(f"{name} {rank} {kind}", **as_rank(rank, way.ranks), **environment) for rank in range(way.ranks)]

        def run(code, **names):
            for one in jobs:
                one.begin(code, folder=tmp_path, **names)
            found = []
            for one in jobs:
                try:
                    found.append(one.finish())
                except JobError as error:
                    found.append(error)
            raised = [each for each in found if isinstance(each, JobError)]
            if raised and not environment:
                raise raised[0]
            return found

        return jobs, run

    return get


def test_it_loads_as_stock_with_one_warning_and_a_count(together, way, name, path, served):
    """Equal to stock's, nothing shared; two loads give one warning with the reason, and two counts."""
    jobs, run = together()
    code = f"{way.code}\nresult = {way.answer}, facts(my_model)[0]"
    before = served().counters
    stock = run(code, path=path, device_map=None)
    assert served().counters == before
    assert all(shared == 0 for _, shared in stock)
    for _ in range(2):
        assert run(code, path=path, device_map="wooly:cpu") == stock
    for one in jobs:
        (line,) = [line for line in one.log().splitlines() if "the stock way" in line]
        assert way.reason in line
        assert "WOOLY_STRICT=1" in line
    after = served().counters
    assert after.fallbacks - before.fallbacks == (0 if name == "no store" else 2 * way.ranks)
    assert (after.publishes, after.aborted_publishes) == (before.publishes, before.aborted_publishes)


def test_strict_mode_raises_before_any_weight_is_read(together, way, name, path, opened):
    """The error has the reason, and the file with the weights was not opened."""
    jobs, run = together(WOOLY_STRICT="1")
    run("import os, torch.distributed, transformers.integrations.tensor_parallel")
    opened(path / way.weights)
    for error in run(way.code, path=path, device_map="wooly:cpu"):
        assert isinstance(error, JobError)
        assert error.name == ("StoreUnavailableError" if name == "no store" else "UnsupportedError")
        assert way.reason in error.text
    assert opened() == 0
    assert not any("the stock way" in one.log() for one in jobs)
