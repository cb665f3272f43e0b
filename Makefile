# Needs Python 3.11+ and make. `make install` is for use and development (.venv, wooly from this tree); `make test` has
# an environment of its own, with the built wheel in it, so that what is tested is what is shipped.

PYTHON ?= python3
VENV := .venv
TEST_VENV := build/venv-test
WHEEL_VENV := build/venv-wheel
INSTALLER := deploy/install.py deploy/vllm_cpu_shim.py
TOOLS := $(TEST_VENV)/bin
RELEASE_VENV := build/venv-release
SCRIPTS := benchmarks $(wildcard deploy/*.py examples/*.py docs/site/*.py)
PYTEST_ARGUMENTS ?= -n 2
VERSIONS ?=
GPU_PYTHON ?= $(VENV)/bin/python
SOAK_PYTHON ?= $(VENV)/bin/python
HF_PARTS ?= memory,speed
DISK ?= yes
GPU_TESTS ?= tests/memory tests/gpu
PARITY ?= --lanes 1
PARTS ?= digest,load,peak,decode,ttft,capacity,mps,dedup

.DEFAULT_GOAL := help
.PHONY: help install demo demo-overcommit test lint docs wheel changelog release bench soak soak-hour parity gpu hf-versions vllm-versions newest clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/.installed ## vLLM and wooly (from this tree) in .venv

$(VENV)/.installed: pyproject.toml $(INSTALLER)
	$(PYTHON) deploy/install.py --venv $(VENV)
	@touch $@

demo: install ## two vLLM servers on one copy of a real model's weights (10 minutes at most)
	@$(VENV)/bin/python benchmarks demo

demo-overcommit: install ## three chat models in the memory of one and a half (10 minutes at most)
	@$(VENV)/bin/python benchmarks demo-overcommit

wheel: ## dist/wooly-VERSION-py3-none-any.whl
	@test -x $(WHEEL_VENV)/bin/python || $(PYTHON) -m venv $(WHEEL_VENV)
	@rm -rf dist
	$(WHEEL_VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

$(TEST_VENV)/.installed: pyproject.toml $(INSTALLER)
	$(PYTHON) deploy/install.py --venv $(TEST_VENV) --without-wooly
	@touch $@

lint: $(TEST_VENV)/.installed ## ruff, mypy, and the layers
	$(TOOLS)/ruff check .
	$(TOOLS)/ruff format --check .
	$(TOOLS)/mypy
	MYPYPATH=tests:deploy:docs/site $(TOOLS)/mypy $(SCRIPTS)
	$(TOOLS)/lint-imports

# The reference is generated from the packages of this tree. A dead link, anchor or page outside of the navigation is an error.
docs: $(TEST_VENV)/.installed ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:docs/site $(TOOLS)/mkdocs build --quiet
	@echo "docs: build/site/index.html"

# PYTHONSAFEPATH keeps the working directory, and with it the source tree, off the import path: in pytest and in every
# process that a test starts. tests/integration/test_wheel.py checks that it did.
test: $(TEST_VENV)/.installed ## everything that CI runs: lint, the site, build the wheel, install it, and the whole test suite on it
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint docs wheel
	$(PYTHON) deploy/install.py --venv $(TEST_VENV) --wheel dist/*.whl
	PYTHONSAFEPATH=1 WOOLY_TESTED_WHEEL="$$(ls dist/*.whl)" $(TOOLS)/pytest $(PYTEST_ARGUMENTS)

$(RELEASE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python deploy/release.py --tools
	@touch $@

changelog: $(RELEASE_VENV)/.installed ## the section of the changelog that the fragments make
	$(RELEASE_VENV)/bin/towncrier build --draft --version "$$($(PYTHON) deploy/release.py --version)"

release: $(RELEASE_VENV)/.installed ## build sdist and wheel, check them, and run the wheel in a fresh environment (docs/releasing.md)
	$(RELEASE_VENV)/bin/python deploy/release.py

bench: install ## benchmarks on a CPU, plots and summary (in benchmarks/results)
	$(VENV)/bin/python benchmarks cpu
	$(VENV)/bin/python benchmarks hf
	$(VENV)/bin/python benchmarks disk
	$(VENV)/bin/python benchmarks store
	$(VENV)/bin/python benchmarks summary
	$(VENV)/bin/python benchmarks plot

soak: install ## clients of two protocols that die at random, and stores that are killed, for two minutes (results/soak.json)
	$(VENV)/bin/python benchmarks soak
	$(VENV)/bin/python benchmarks summary

# Paced, at the lowest priority: half a core. It ends by itself, and writes its result only if nothing was wrong.
soak-hour: ## the same for an hour, with few clients (results/soak-hour.json)
	nice -n 19 $(SOAK_PYTHON) benchmarks soak --seconds 3600 --processes 4 --old 1 --clients 12 --pause 1 --every 10 \
		--disrupt 120 --out benchmarks/results/soak-hour.json

# On a machine with a GPU: GPU_PYTHON=... PARITY="--lanes 4 --budget-s 500 --missing", repeated until no row is missing.
parity: ## stock, publisher and reader compared over models and quantizations (PARITY=options), and docs/parity.md
	$(GPU_PYTHON) benchmarks parity $(PARITY)
	$(GPU_PYTHON) benchmarks parity --markdown
	$(GPU_PYTHON) benchmarks summary

hf-versions: ## the tests of wooly_hf over versions of transformers (VERSIONS="5.16 5.24"; all that are supported)
	$(PYTHON) deploy/hf_versions.py $(VERSIONS) -- $(PYTEST_ARGUMENTS)

vllm-versions: ## the tests of wooly_vllm over versions of vLLM on a CPU (VERSIONS="0.26 0.29"; all that are supported)
	$(PYTHON) deploy/vllm_versions.py $(VERSIONS) -- $(PYTEST_ARGUMENTS)

# Exit code 1: tests fail; 3: they pass, and the range in pyproject.toml does not include an engine's newest version.
newest: ## the engines' tests with the newest of every package, and what moved since the last run (results/newest.json)
	$(PYTHON) deploy/newest.py -- $(PYTEST_ARGUMENTS)

# GPU_PYTHON is any interpreter that finds vLLM, wooly and pytest (for example on PYTHONPATH): no network, no installation.
# All parts together take an hour on an H100. An empty variable skips a part. In pieces of at most ten minutes:
#   make gpu PARTS= HF_PARTS= DISK= GPU_TESTS=tests/gpu/test_engines.py
#   make gpu GPU_TESTS= HF_PARTS= DISK= PARTS=digest,load,peak,decode      then ttft, then capacity, then mps,dedup
#   make gpu GPU_TESTS= PARTS= DISK=      and last   make gpu GPU_TESTS= PARTS= HF_PARTS=
# Warnings of other packages are not errors here, because their versions are those of the machine.
gpu: ## GPU tests (GPU_TESTS=...), then benchmarks (PARTS=load,decode,... HF_PARTS=... DISK=yes), with GPU_PYTHON
	$(if $(strip $(GPU_TESTS)),$(GPU_PYTHON) -m pytest -o filterwarnings=default -m gpu $(GPU_TESTS))
	$(if $(strip $(PARTS)),$(GPU_PYTHON) benchmarks gpu --parts $(PARTS))
	$(if $(strip $(HF_PARTS)),$(GPU_PYTHON) benchmarks hf --gpu --parts $(HF_PARTS))
	$(if $(strip $(DISK)),$(GPU_PYTHON) benchmarks disk --gpu)
	$(GPU_PYTHON) benchmarks summary
	$(GPU_PYTHON) benchmarks plot

clean: ## remove environments, builds and caches
	rm -rf $(VENV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
