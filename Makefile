# `make train` and `make test` do all their own set-up.
PYTHON ?= python3
WORKDIR ?= runs/demo
BIN := .venv/bin

.PHONY: train test test-slow lint setup

train: setup  ## meta-trains a rater on the demo corpus; ends in minutes with figures in runs/demo
	$(BIN)/python train.py --workdir=$(WORKDIR)

test: setup lint  ## under 15 minutes on 2 cores
	$(BIN)/python -m pytest

test-slow: setup  ## the demo's promises, measured; kill -9
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/ready .cache/demo_corpus.jsonl

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.cache/demo_corpus.jsonl: .venv/ready demo_corpus.py
	$(BIN)/python demo_corpus.py --output=$@
	touch $@
