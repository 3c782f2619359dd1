# Two commands need nothing but Python 3.11+ and make:
#   make demo    set up .venv, rewrite a real checkpoint, compare embeddings, print the report
#   make test    set up .venv, run the tests (all but the slow ones), lint and type checks
# Every target can be run again, in any order, and from a path with spaces.

PYTHON ?= python3
JOBS ?= 2
# The build of torch is found by pip as it is configured here.  Elsewhere the CPU build is had with
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Only where torch did not bring the triton it wants.
TRITON ?= triton==3.9.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
LINKS := build/typing/attn_rewrite
# Tests and examples share the cores between processes, not threads.
RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv gpu-test gpu-bench demo test test-slow zoo matrix test-all lint types format wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

venv: .venv/ready  ## make .venv with pinned versions

# A stamp, so that a set-up that was interrupted is done again.
.venv/ready: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.12") if not (3, 11) <= sys.version_info < (3, 14) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(TORCH)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt "$(TORCH)"
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("triton") or sys.platform != "linux"))' || $(PIP) "$(TRITON)"
	@echo "installing attn-rewrite and its development tools"
	@$(PIP) -c constraints.txt "$(TORCH)" -e ".[dev]"
	@$(PIP) -c constraints.txt --no-deps timm  # its torchvision has no CPU build; tests stand in for it
	@touch $@

demo: .venv/ready  ## rewrite a real checkpoint and compare embeddings
	@$(RUN) $(BIN)/python examples/demo.py --output build/demo

test: .venv/ready  ## tests but the slow ones, then lint and types
	$(RUN) $(BIN)/python -m pytest -m "not slow and not zoo and not matrix and not gpu" -n $(JOBS) --dist worksteal --durations=40
	@$(MAKE) --no-print-directory lint types

test-slow: .venv/ready  ## only the slow tests
	$(RUN) $(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal --durations=40 || test $$? -eq 5

zoo: .venv/ready  ## every row of the zoo (write the table with: .venv/bin/python -m tests.zoo)
	$(RUN) $(BIN)/python -m pytest -m zoo -n $(JOBS) --dist worksteal

matrix: .venv/ready  ## the longest: ONNX models of any size under every policy, kernels for every target
	$(RUN) $(BIN)/python -m pytest -m matrix -n $(JOBS) --dist worksteal

# The machine's own Python, with its torch and triton: nothing is installed and no network is needed.
build/gpu/ready: Makefile
	@rm -rf build/gpu && mkdir -p build/gpu/attn_rewrite
	@for entry in rewriter/*; do ln -s "../../../$$entry" build/gpu/attn_rewrite/; done
	@ln -s ../../../passes ../../../backends build/gpu/attn_rewrite/
	@touch $@

gpu-test: build/gpu/ready  ## kernels on this machine's GPU against dense float64 attention
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU is visible to this Python")'
	PYTHONPATH=build/gpu:. $(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/gpu

gpu-bench: build/gpu/ready  ## kernels on this machine's GPU beside SDPA, FlexAttention and torch.compile
	PYTHONPATH=build/gpu:. $(PYTHON) examples/benchmarks/triton_attention.py $(BENCH)

test-all: test test-slow  ## every test

lint: .venv/ready  ## ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# mypy does not see through an editable install that renames folders: it reads a tree of links.
types: .venv/ready  ## mypy, strict
	@rm -rf build/typing && mkdir -p $(LINKS)
	@for entry in rewriter/*; do ln -s "../../../$$entry" $(LINKS)/; done
	@ln -s ../../../passes ../../../backends $(LINKS)/
	MYPYPATH=build/typing $(BIN)/python -m mypy --explicit-package-bases -p attn_rewrite

format: .venv/ready  ## rewrite the sources in the project's format
	$(BIN)/python -m ruff check --fix-only --quiet .
	$(BIN)/python -m ruff format .

wheel: .venv/ready  ## build the wheel through the source archive
	$(BIN)/python -m build --outdir dist

clean:  ## remove what the other targets made
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
