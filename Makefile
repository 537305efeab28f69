# The two commands: `make run` serves on 127.0.0.1:5100, `make test` proves it with real clients.
# Both set up what they need; a second run has nothing to set up.

VENV := .venv
PYTHON := $(VENV)/bin/python
# Processes that share the tests. More than there are processors: most tests wait most of the time.
WORKERS ?= 5
# worksteal: a worker that has nothing left to do takes tests from another one. By file, the workers
# would end at very different times: some files take a minute, most take less than a second.
PYTEST := $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal
# Python shall keep the byte code. Without it, each server that a test starts is compiled anew: 0.2 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test lint check test-long robustness bench packages clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	@exec $(VENV)/bin/oci-mirror serve --config config/mirror.yaml

test: packages
	@$(MAKE) --no-print-directory check

lint: $(VENV)/.installed-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy tests/real tests/conftest.py tools/readability.py tools/request_path.py
	$(PYTHON) tools/readability.py

# The linters run beside the tests. Their output is kept apart, and shown at the end if one failed.
check: $(VENV)/.installed-dev
	@output=$$(mktemp); $(MAKE) --no-print-directory lint >"$$output" 2>&1 & lint=$$!; \
	$(PYTEST) -m "not long"; failed=$$?; \
	wait $$lint || { failed=$$?; cat "$$output"; }; \
	rm -f "$$output"; exit $$failed

# One after the other, the longest first: at the end no worker is left with a test of two minutes.
test-long: packages $(VENV)/.installed-dev
	$(PYTEST) --dist load --maxschedchunk 1 -m long

# Every row and every long test, at all points (tests/extent.py), and how often each row was tried
# into docs/robustness.md.
robustness: packages $(VENV)/.installed-dev
	$(PYTEST) -m 'row or long' --every-point --robustness-table=docs/robustness.md

bench: packages $(VENV)/.installed-dev
	@$(PYTHON) -m bench $(ROWS)

packages:
	@tools/packages

$(VENV)/.installed: pyproject.toml tools/constraints.txt tools/venv
	@echo 'Installing oci-mirror into $(VENV): about a minute the first time.'
	@tools/venv $(VENV) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml tools/constraints.txt tools/venv
	@echo 'Installing oci-mirror and its tools into $(VENV): a minute or two the first time.'
	@tools/venv $(VENV) '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
