# Each target sets up what it needs (a virtual environment in .venv, pinned by constraints.txt) and does its job:
#
#   make test       the tests, but the slow ones (all of them where CI is set)
#   make test-all   the slow ones too
#   make demo       train a small model on preferences and report what it gained
#   make bench      time and memory against every peer, on the CPU unless there is a GPU; no figure if a test is red;
#                   heads of real models: make bench ARGS="--suite models --model qwen3-0.6b --tokens 512,2048"
#   make bench-gpu  tests with real kernels, then what matters most first, in under 10 minutes on one GPU
#   make aot        compile every kernel for GPUs that need not be here: bench/results/aot.jsonl and aot.md again
#   make docs       write docs/losses.md again, from what the registry of losses says
#   make studies    what the losses do: small seeded experiments, every table and picture of bench/studies again
#   make clean      remove the environment and everything built (never runs/)
#
# Variables: PYTHON (an interpreter, 3.10 or newer), VENV (.venv), ARGS (handed on to the command of the target).

VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: test test-all demo bench bench-gpu aot docs studies clean

test: $(STAMP)
	$(BIN)/python -m pytest $(if $(CI),,-m "not slow") $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

demo: $(STAMP)
	$(BIN)/prefkern demo $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m bench $(ARGS)

# An interpreter that has torch and triton serves as it is: a GPU machine may reach no package index.
bench-gpu:
	@python=$(or $(PYTHON),python3); \
	if ! $$python -c 'import torch, triton, transformers' 2>/dev/null; then \
		$(MAKE) --no-print-directory $(STAMP) && python=$(BIN)/python || exit 1; \
	fi; \
	$$python -m bench.gpu $(ARGS)

aot: $(STAMP)
	$(BIN)/python -m prefkern.kernels.aot_table bench/results/aot $(ARGS)

docs: $(STAMP)
	mkdir -p docs
	$(BIN)/prefkern losses --markdown > docs/losses.md.partial
	mv docs/losses.md.partial docs/losses.md

studies: $(STAMP)
	$(BIN)/python -m bench.studies $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian splits it off) makes an environment without pip; its own pip then fills it.
# The build tools are pinned like the rest, so the project is built with those and not in an isolated environment.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard kernels/*.cpp kernels/*.h)
	@python=; for p in $(or $(PYTHON),$(CANDIDATES)); do \
		if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python >= 3.10 found (tried: $(or $(PYTHON),$(CANDIDATES))). Install one, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
		echo "Setting up $(VENV) with $$($$python --version); the first time downloads torch, which takes some minutes."; \
		$$python -m venv $(VENV) >/dev/null 2>&1 || { \
			$$python -m venv --clear --without-pip $(VENV) && $$python -m pip --python $(BIN)/python install pip; }; \
	fi
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[test,bench]"
	@touch $(STAMP)
