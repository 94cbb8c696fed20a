PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check docs bench setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/layerwise demo

test: setup
	$(BIN)/python -m pytest -n 2 --maxprocesses 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python docs/make.py --check

docs: setup
	$(BIN)/python docs/make.py

bench: setup
	$(BIN)/python -m benchmarks
