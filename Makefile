# Everything a developer runs. `make run` needs Python 3.11 or newer and nothing else.

# The first interpreter that is new enough; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV ?= .venv
PY := $(VENV)/bin/python
JOBS ?= 2
IMAGE ?= agent-gateway:dev
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/gateway/__init__.py)

export PYTHONPATH := src

.DEFAULT_GOAL := help
.PHONY: help run install install-dev fmt lint types test test-acceptance coverage smoke wheel sbom audit docker-build \
	release lock docs load bench bench-peers

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
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-acceptance: $(VENV)/.dev  ## The end-to-end suite alone: servers, clients and upstreams on sockets
	$(PY) -m pytest -n $(JOBS) tests/e2e tests/test_smoke_gateway.py $(ARGS)

coverage: $(VENV)/.dev  ## The whole suite, with a coverage report
	$(PY) -m pytest -n $(JOBS) --cov --cov-report=term-missing:skip-covered $(ARGS)

smoke: $(VENV)/.dev  ## The end-to-end smoke test alone
	$(PY) -m pytest tests/test_smoke_gateway.py

wheel: $(VENV)/.dev  ## Build the wheel into dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

sbom: $(VENV)/.dev build/runtime/.runtime  ## Write sbom.json (CycloneDX, with hashes) of what requirements.txt installs
	$(PY) scripts/sbom.py build/runtime/bin/python

audit: build/runtime/.runtime  ## Look for weak keys, forgotten modules and vulnerable packages; fails on any
	@GATEWAY_ENV=$${GATEWAY_ENV:-development} build/runtime/bin/python scripts/audit.py --lock requirements.txt $(ARGS)

docker-build:  ## Build the container image
	docker build --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) --tag $(IMAGE) .

release:  ## Check, build, sign and tag a version: make release VERSION=0.1.0
	scripts/release.sh v$(VERSION)

lock: $(VENV)/.dev  ## Pin pyproject.toml's dependencies with hashes (UPGRADE=1: take newer releases)
	UV=$(VENV)/bin/uv UPGRADE=$(UPGRADE) scripts/lock.sh

docs: $(VENV)/.dev  ## Write the generated tables of docs/references
	$(PY) scripts/reference_docs.py

load: $(VENV)/.dev  ## Send a mix of plain and streamed calls to a gateway: make load ARGS="--url URL --key KEY"
	$(PY) scripts/load.py $(ARGS)

bench: $(VENV)/.dev  ## Measure, and print ratios
	$(PY) benchmarks/run.py $(ARGS)

bench-peers: $(VENV)/.dev  ## Install the gateways to compare with (LiteLLM, Portkey) into build/peers
	$(PY) benchmarks/peers/install.py

# A stamp says that a lock is installed, so that the second start is quick.
%/.runtime: requirements.txt | %/bin/python
	@echo "Installing the locked requirements into $* ..." >&2
	@$*/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

# Made anew when the lock changes, so that it holds nothing else.
build/runtime/.runtime: requirements.txt
	@rm -rf build/runtime
	@$(PYTHON) -m venv build/runtime
	@build/runtime/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	@echo "Installing the locked development requirements into $(VENV) ..." >&2
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $(VENV)/.runtime $@

.PRECIOUS: %/bin/python
%/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or run make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -m venv $*
