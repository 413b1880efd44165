# Python 3.10 or later is all that these need; environments are made on first use.
PYTHON ?= python3
# A version of transformers for `make test-with`.
TRANSFORMERS ?=

.PHONY: demo test test-oldest test-with coverage lint types clean

demo: .venv/.ready
	.venv/bin/python benchmarks/demo.py

test: .venv/.ready
	.venv/bin/python -m pytest

# The lowest versions that pyproject.toml takes.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest

# SGLang's, for one: make test-with TRANSFORMERS=5.19.0
test-with: $(if $(TRANSFORMERS),.venv-$(TRANSFORMERS)/.ready)
	@test -n "$(TRANSFORMERS)" || { echo "error: say which: make test-with TRANSFORMERS=5.19.0" >&2; exit 1; }
	.venv-$(TRANSFORMERS)/bin/python -m pytest

# The tests, and the lines of each file that none of them runs.
coverage: .venv/.ready
	.venv/bin/python -m pytest --cov

lint: .venv/.ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/.ready
	.venv/bin/python -m mypy

.venv/.ready: pyproject.toml scripts/setup.sh
	@echo "Setting up .venv (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" bash scripts/setup.sh
	@touch $@

.venv-%/.ready: pyproject.toml scripts/setup.sh
	@echo "Setting up .venv-$* (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" VENV=".venv-$*" PINS="$(if $(filter oldest,$*),floors,transformers==$*)" bash scripts/setup.sh
	@touch $@

clean:
	rm -rf .venv .venv-*
