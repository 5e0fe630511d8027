# Two commands: `make demo` and `make test`. Both create .venv with what requirements.lock pins.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed
CHIP   ?= auto
MODEL  ?= qwen3-0.6b

.PHONY: demo test test-all lint types imports pytest gpu-test bench clean

demo: $(DONE)
	$(BIN)/klab run --model $(MODEL) --chip $(CHIP)

test: lint types imports pytest

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DONE)
	$(BIN)/mypy

imports: $(DONE)
	$(BIN)/lint-imports

# Processes that test side by side. Tests that share a costly fixture stay together (tests/conftest.py).
JOBS   ?= 2

pytest: $(DONE)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not thorough and not gpu"

# Every test: some ten minutes more on 2 cores.
test-all: lint types imports
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup

# On a machine with a GPU: every kernel against its reference on the device, in bf16 and fp16.
gpu-test: $(DONE)
	$(BIN)/python -m pytest -q -m gpu

# What tuning costs and how good it is: search overhead, memory, candidates compiled per minute, the scoreboard.
bench: $(DONE)
	$(BIN)/python -m pytest -q ci/overheads --benchmark-enable -s

$(DONE): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "klab needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
