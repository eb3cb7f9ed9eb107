# Every target sets up what it needs: `make serve` is the only command a fresh machine has to know.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: serve chat test test-quick check format clean

serve: $(VENV)/.installed
	$(BIN)/penstock serve $(ARGS)

chat: $(VENV)/.installed
	$(BIN)/penstock chat $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or later, or name yours: make serve PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard src/penstock/kernels/*/*.cpp src/penstock/kernels/*/*.h)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[engine]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
