# `make` alone lists the targets. Each sets up what it needs, once.

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CONSTRAINTS := constraints.txt
# Test processes: one a core, at most 8 so that they also fit beside each other on one GPU.
WORKERS ?= $(shell $(PY) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 2)
# A file to a process, so that what its tests share is made once; the longest, in tests/host/, first. (Groups by mark do
# nothing: pytest 9.2 overlooks the names that pytest-xdist 3.8 gives them.)
DIST := --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train test test-newest fuzz lint types docs site hub-kernel survive gpu-check clean

help: ## list the targets
	@echo "Targets (PYTHON=python3.12 picks the interpreter, ARGS=... is passed on):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv with the pinned versions and this package, editable

train: $(INSTALLED) ## train a small STViT on scikit-learn's handwritten digits, into runs/digits
	$(PY) main.py --data-set DIGITS --model stvit_tiny --output_dir runs/digits $(ARGS)

test: $(INSTALLED) ## run the tests, on the GPU where there is one (ARGS="-k layout" for some)
	$(PY) -m pytest -n $(WORKERS) $(DIST) $(ARGS)

test-newest: ## run the tests with the newest torch, in .venv-newest (ARGS="tests/kernels" for some)
	$(MAKE) setup VENV=.venv-newest CONSTRAINTS=constraints-newest.txt
	.venv-newest/bin/python -m pytest -n $(WORKERS) $(DIST) $(ARGS)

fuzz: $(INSTALLED) ## draw new examples for the tests that draw any (ARGS="--minutes 60 tests/kernels")
	$(PY) -m tests.support.fuzz --workers $(WORKERS) $(ARGS)

lint: $(INSTALLED) ## check the style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*.* tests/support/emulation/*.h tests/support/emulation/*.c*)

types: $(INSTALLED) ## check the type hints
	$(PY) -m mypy

docs: site ## check the links, paths, commands and examples in the documentation, and build it
	$(PY) -m pytest -q tests/host/test_docs.py

site: $(INSTALLED) ## build the documentation as pages, into site/
	$(PY) -m mkdocs build --quiet --strict

hub-kernel: $(INSTALLED) ## write the ops as a universal kernel for Hugging Face's `kernels`, into build/hub-kernel
	$(PY) -m stvit.hub_kernel build/hub-kernel

KILLS ?= 40
survive: $(INSTALLED) ## kill training runs at KILLS more drawn moments each, and compare how they end
	STVIT_KILLS=$(KILLS) $(PY) -m pytest -q tests/train/test_train_survival.py $(ARGS)

# Sets nothing up: where .venv is missing PYTHON runs it, whose torch and triton are those of the machine.
STAGE ?= all
OUT ?= runs/gpu-check
gpu-check: ## check and measure on a GPU (STAGE=first, second, tests, sanitizer, ops, training, convergence or all; OUT=DIR)
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m bench.gpu_check $(STAGE) --out $(OUT) $(ARGS)

clean: ## remove builds and caches; .venv and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One pip command, so that the constraints hold for everything at once. The stamp is written only when it succeeded,
# and is older than its prerequisites when one of them changed.
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.10 or newer," \
		"or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed," \
		"'$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' lacks the venv or ensurepip" \
		"module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,dev]'
	@touch $@
