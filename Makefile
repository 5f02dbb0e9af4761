# Everything a developer runs. `make run` needs Python 3.11 or newer and nothing else.

# The first interpreter that is new enough; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV ?= .venv
PY := $(VENV)/bin/python
JOBS ?= 2
IMAGE ?= agent-gateway:dev

export PYTHONPATH := src

.DEFAULT_GOAL := help
.PHONY: help run install install-dev fmt lint types test coverage smoke sbom docker-build lock docs bench

help:  ## Say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

run: $(VENV)/.runtime  ## Start the gateway on 127.0.0.1:8000, watching src/agents and src/config
	@$(PY) -m gateway_cli dev $(ARGS)

install: $(VENV)/.runtime  ## Make .venv and install the locked requirements

install-dev: $(VENV)/.dev  ## The same with what the checks and tests need

fmt: $(VENV)/.dev  ## Format
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

lint: $(VENV)/.dev  ## Lint, and check the format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.dev  ## mypy, strict
	$(PY) -m mypy

test: $(VENV)/.dev  ## The whole suite
	$(PY) -m pytest -n $(JOBS) $(ARGS)

coverage: $(VENV)/.dev  ## The whole suite, with a coverage report
	$(PY) -m pytest -n $(JOBS) --cov --cov-report=term-missing:skip-covered $(ARGS)

smoke: $(VENV)/.dev  ## The end-to-end smoke test alone
	$(PY) -m pytest tests/test_smoke_gateway.py

sbom: $(VENV)/.dev build/runtime/.runtime  ## Write sbom.json (CycloneDX) of exactly what requirements.txt installs
	$(VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--of JSON -o sbom.json build/runtime/bin/python

docker-build:  ## Build the container image
	docker build --tag $(IMAGE) .

lock: $(VENV)/.dev  ## Pin pyproject.toml's dependencies with hashes (UPGRADE=1: take newer releases)
	UV=$(VENV)/bin/uv UPGRADE=$(UPGRADE) scripts/lock.sh

docs: $(VENV)/.dev  ## Write the generated tables of docs/references
	$(PY) scripts/reference_docs.py

bench: $(VENV)/.dev  ## Measure, and print ratios
	$(PY) benchmarks/run.py $(ARGS)

# A stamp says that a lock is installed, so that the second start is quick.
%/.runtime: requirements.txt | %/bin/python
	@echo "Installing the locked requirements into $* ..."
	@$*/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	@echo "Installing the locked development requirements into $(VENV) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $(VENV)/.runtime $@

.PRECIOUS: %/bin/python
%/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or run make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -m venv $*
