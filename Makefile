# Everything starts here: `make demo` and `make test` work from a bare clone with only python3 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?= --quick

# Nothing below fetches models or data; idle threads yield their core; tokenizers keep to one thread; mkdocs does not advertise.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1

INPUTS := pyproject.toml constraints.txt
PACKAGE_STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check format format-check lint types contracts docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(PACKAGE_STAMP) ## create .venv and install the package into it (the other targets do this too)

demo: $(PACKAGE_STAMP) ## fine-tune a real encoder dense and compressed, and print what was gained
	$(BIN)/lightning-compress demo $(DEMO_ARGS)

test: $(PACKAGE_STAMP) ## run the test suite and the doctests (TEST_ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(TEST_ARGS)

check: format-check lint types contracts docs test ## everything CI checks

format: $(PACKAGE_STAMP) ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(PACKAGE_STAMP) ## are the sources formatted?
	$(BIN)/ruff format --check .

lint: $(PACKAGE_STAMP) ## ruff's rules
	$(BIN)/ruff check .

types: $(PACKAGE_STAMP) ## pyright
	$(BIN)/pyright

contracts: $(PACKAGE_STAMP) ## who may import whom
	$(BIN)/lint-imports

docs: $(DOCS_STAMP) ## build the documentation into site/, with every warning an error
	$(BIN)/mkdocs build --quiet --strict

bench: $(PACKAGE_STAMP) ## measure latency and print a table (BENCH_ARGS= for the long run)
	$(BIN)/python benchmarks/latency.py $(BENCH_ARGS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "The venv module is missing (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(PACKAGE_STAMP): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV) (several minutes the first time, nothing afterwards)"
	$(PIP_INSTALL) --editable '.[demo,dev]'
	@touch $@

$(DOCS_STAMP): $(INPUTS) | $(PACKAGE_STAMP)
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@
