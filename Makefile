# Every target sets up the environment it needs, so a fresh checkout needs no other step first.
# ARGS goes to the program that the target runs:  make test ARGS='-k mapper'

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# Two targets at once would have two pips write into one environment.
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
RUN_VENV ?= .venv-run
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
ARGS ?=

# The first that starts and is new enough. Each is started, because a version manager leaves commands on PATH that only say
# that their Python is not selected.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# A source file that comes, goes or changes makes `make run` install again: its environment holds a copy. The folders are in
# the list for the files that go.
SOURCES = $(shell find src -not -path '*/__pycache__*')

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: $(RUN_VENV)/.installed ## Run `ramblock run $(ARGS)` from an ordinary installation
	@$(RUN_VENV)/bin/ramblock run $(ARGS)

.PHONY: test
ifdef WHEEL
# What a user gets, away from the source tree: a module or data file missing from the wheel fails here and only here.
test: $(VENV)/.made
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	@away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(BIN)/python -m venv "$$away/venv"; \
	"$$away/venv/bin/python" $(PIP) "$$(echo build/wheel/ramblock-*.whl)[test]"; \
	cp -R tests lab pyproject.toml "$$away/"; \
	cd "$$away"; \
	venv/bin/python -I -c 'import pathlib, sys, ramblock; where = pathlib.Path(ramblock.__file__); \
	    where.is_relative_to(pathlib.Path(sys.prefix)) or sys.exit(f"not the installed wheel: {where}"); \
	    print(f"testing {where.parent}")'; \
	venv/bin/pytest $(ARGS)
else
test: $(VENV)/.test ## Run the tests on the source tree; WHEEL=1: on a wheel built from it
	@$(BIN)/pytest $(ARGS)
endif

# The core, scenarios and what is drawn: whatever a dependency does for us.
LOWEST_TESTS = tests/test_bitmap.py tests/test_attributes.py tests/test_guest_memory.py tests/test_differential.py \
	tests/test_stateful.py tests/test_run.py tests/check/test_command.py tests/plan/test_command.py \
	tests/cli/test_hostile_text.py tests/cli/test_terminal.py tests/test_quoted_output.py

.PHONY: test-lowest
test-lowest: $(VENV)/.made ## Run the core's tests with the lowest version of each runtime dependency
	@away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(BIN)/python tools/lowest.py >"$$away/constraints.txt"; cat "$$away/constraints.txt"; \
	$(BIN)/python -m venv "$$away/venv"; \
	"$$away/venv/bin/python" $(PIP) --constraint "$$away/constraints.txt" --editable '.[test]'; \
	"$$away/venv/bin/pytest" -p no:cacheprovider $(LOWEST_TESTS) $(ARGS)

.PHONY: lab
lab: $(VENV)/.made ## Build the lab: a kernel and a QEMU, in the user's cache (once: a quarter of an hour)
	@$(BIN)/python -m lab build $(ARGS)

.PHONY: lab-test
lab-test: $(VENV)/.test ## Run the tests of tests/lab in the lab's virtual machine, once for each of its variants
	@$(BIN)/python -m lab test $(ARGS)

.PHONY: lint
lint: $(VENV)/.lint ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.lint ## Format the code and make the fixes that are safe
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: docs
docs: $(VENV)/.docs ## Build the documentation into build/docs
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs $(ARGS)
	@echo 'built build/docs/index.html'

.PHONY: bench
bench: $(VENV)/.bench ## Measure the numbers that the design promises; build/bench/ gets them as JSON, Markdown, picture
	@$(BIN)/python benchmarks/run.py --json build/bench/results.json --markdown build/bench/short.md \
	    --plot build/bench/cost.svg $(ARGS)

.PHONY: bench-quick
bench-quick: $(VENV)/.bench ## The same with fewer rounds: does everything still run?
	@$(BIN)/python benchmarks/run.py --quick $(ARGS)

FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: $(VENV)/.fuzz ## Fuzz vfio-user (messages and whole sessions) and the readers of traces, FUZZ_SECONDS (60) each; build/fuzz/ keeps what breaks
	@mkdir -p build/fuzz/corpus
	@$(BIN)/python fuzz/readers.py --seconds $(FUZZ_SECONDS)
	@$(BIN)/python fuzz/sessions.py --seconds $(FUZZ_SECONDS)
	@$(BIN)/python fuzz/vfio_user.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=10 -rss_limit_mb=1024 \
	    -artifact_prefix=build/fuzz/ $(ARGS) build/fuzz/corpus

.PHONY: clean
clean: ## Remove environments, caches and everything built
	rm -rf $(VENV) $(RUN_VENV) build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy reads the types of what the tests import, so it needs the tests' packages beside its own.
$(VENV)/.lint: EXTRAS = lint,test
$(VENV)/.test: EXTRAS = test
$(VENV)/.docs: EXTRAS = docs
$(VENV)/.bench: EXTRAS = bench
$(VENV)/.fuzz: EXTRAS = fuzz

$(VENV)/.lint $(VENV)/.test $(VENV)/.docs $(VENV)/.bench $(VENV)/.fuzz: pyproject.toml $(VENV)/.made
	@echo 'installing ramblock[$(EXTRAS)] into $(VENV)' >&2
	@$(BIN)/python $(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

$(RUN_VENV)/.installed: pyproject.toml $(RUN_VENV)/.made $(SOURCES)
	@echo 'installing ramblock into $(RUN_VENV)' >&2
	@$(RUN_VENV)/bin/python $(PIP) .
	@touch $@

# Debian packs ensurepip apart from python3; without it `-m venv` leaves half an environment behind, hence the question first.
%/.made:
	@if [ -z "$(PYTHON)" ]; then \
	    echo 'ramblock needs Python 3.11 or newer: on Debian and Ubuntu, apt-get install python3 python3-venv;' >&2; \
	    echo 'if it is installed somewhere else, make PYTHON=/path/to/python3' >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo 'this Python cannot make virtual environments: on Debian and Ubuntu, apt-get install' \
	        "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear $(@D)
	@touch $@
