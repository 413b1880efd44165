# Python 3.10 or later is all that these need; .venv is made on first use.
PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test lint clean

demo: $(READY)
	.venv/bin/python benchmarks/demo.py

test: $(READY)
	.venv/bin/python -m pytest

lint: $(READY)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

$(READY): pyproject.toml scripts/setup.sh
	@echo "Setting up .venv (once, a few minutes) ..."
	@PYTHON="$(PYTHON)" bash scripts/setup.sh
	@touch $@

clean:
	rm -rf .venv
