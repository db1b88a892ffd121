# `make train` and `make test` do all their own set-up.
PYTHON ?= python3
WORKDIR ?= runs/demo
WORKERS ?= 2
BIN := .venv/bin

.PHONY: train reproduce test test-slow test-compile lint setup

train: setup  ## meta-trains a rater on the demo corpus; ends in minutes with figures in runs/demo
	$(BIN)/python train.py --workdir=$(WORKDIR)

reproduce: setup  ## the paper's three steps, RESULTS.md and figures: about an hour on 2 cores
	$(BIN)/python -m experiments.reproduce

# A file of tests runs in one process, so that its fixtures are made once.
test: setup lint  ## about 12 minutes on 2 cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: setup  ## kill -9, two hosts, benchmark files from a package: about 7 minutes
	$(BIN)/python -m pytest -m slow

# Compilers for TPUs and an H100 beside JAX disturb ordinary runs on CPU: an environment of their own.
test-compile: .venv-compile/ready  ## the kernels compiled for TPU v5e, v5p, v6e and H100; no device needed
	PATH="$$(echo $(CURDIR)/.venv-compile/lib/python*/site-packages/nvidia/cu13/bin):$$PATH" \
	  .venv-compile/bin/python -m pytest -rs -n $(WORKERS) tests/planner/test_compiled.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/ready .cache/demo_corpus.jsonl

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-compile/ready: .venv/ready  # the packages of .venv, and the compilers
	$(PYTHON) -m venv .venv-compile
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" > "$$(.venv-compile/bin/python -c "$$site")/venv.pth"
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	  .venv-compile/bin/python -m pip install --quiet --no-deps libtpu nvidia-cuda-nvcc \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

.cache/demo_corpus.jsonl: .venv/ready corpus/demo.py
	$(BIN)/python -m corpus.demo --output=$@
	touch $@
