# make test         the checks and the tests, in an environment made from nothing (Python 3.11 or later, pip)
# make quickstart   the whole path on the embedded mini world; ARGS='--output_dir elsewhere' and other settings
# make lint, make wheel

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: test lint quickstart wheel clean

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/mypy

quickstart: $(VENV)/.installed
	$(BIN)/mm-prm quickstart $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mm-prm needs Python 3.11 or later; $(PYTHON) is " \
		+ sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

# Installed anew whenever what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(VENV)/.installed $@
