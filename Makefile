# Every target sets up what it needs: `make serve` is the only command a fresh machine has to know.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Processes that share the tests; 0: none, for a debugger. A file's tests stay together, and one that dies fails the run.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
SHARED := -n $(WORKERS) --dist loadfile --max-worker-restart 0

.PHONY: serve chat test test-quick sanitize emulate check format clean

serve: $(VENV)/.installed
	$(BIN)/penstock serve $(ARGS)

chat: $(VENV)/.installed
	$(BIN)/penstock chat $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

test-quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SHARED) -m "not slow" $(ARGS)

# The kernels' tests with kernels built another way. The interpreter outside the virtual environment runs them, because
# inside it the editable install's kernels would be found first.
REBUILD = $(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/$@d . --config-settings=build-dir=build/$@
WITH_REBUILT = PYTHONPATH=build/$@d:$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
BASE_PYTHON = $$($(BIN)/python -c "import sys; print(sys._base_executable)")

# Under the address and undefined-behaviour sanitizers, which say no where memory lacks, as systems do.
sanitize: $(VENV)/.installed-dev
	$(REBUILD) --config-settings=cmake.define.PENSTOCK_SANITIZE=ON
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONMALLOC=malloc $(WITH_REBUILT) $(BASE_PYTHON) -m pytest tests/kernels $(ARGS)

# In every instruction set, those that this processor lacks too.
emulate: $(VENV)/.installed-dev
	$(REBUILD) --config-settings=cmake.define.PENSTOCK_EMULATE=ON
	$(WITH_REBUILT) $(BASE_PYTHON) -m pytest tests/kernels $(ARGS)

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

# pip shows nothing of a build that succeeds, so what CMakeLists.txt warns of is said here.
SAY_KERNELS = @env -u PENSTOCK_KERNELS $(BIN)/python -c "import penstock.kernels.native._native" 2>/dev/null || \
	echo "no C++ compiler was found: Penstock runs on plain torch, several times slower; install g++, make clean, and again"

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	@echo "installing Penstock and torch and compiling the kernels: some minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[engine]'
	$(SAY_KERNELS)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	@echo "installing Penstock, torch and the development tools and compiling the kernels: some minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(SAY_KERNELS)
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
