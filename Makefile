# The two commands: `make run` serves on 127.0.0.1:5100, `make test` proves it with real clients.
# Both set up what they need; a second run has nothing to set up.

VENV := .venv
PYTHON := $(VENV)/bin/python

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

check: lint
	$(PYTHON) -m pytest -m "not long"

test-long: packages $(VENV)/.installed-dev
	$(PYTHON) -m pytest -m long

# Every row, the long ones too, and how often each was tried into docs/robustness.md.
robustness: packages $(VENV)/.installed-dev
	$(PYTHON) -m pytest -m row --robustness-table=docs/robustness.md

bench: packages $(VENV)/.installed-dev
	@exec bench/run

packages:
	@tools/packages

$(VENV)/.installed: pyproject.toml tools/constraints.txt tools/venv
	@tools/venv $(VENV) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml tools/constraints.txt tools/venv
	@tools/venv $(VENV) '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
