# The few commands people type.  Each installs or builds what it needs and says what it is doing.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# In CI a module that cannot be compiled is an error, elsewhere it runs as it is.
ifeq ($(CI),true)
export DERPER_REQUIRE_EXTENSIONS = 1
endif
# The data path's tests with stock derper, but for two that wait for a minute.
PURE_INTEROP := $(patsubst %,tests/interop/test_%.py,server frames mesh websocket) \
  --deselect tests/interop/test_server.py::test_keep_alives_come_about_once_a_minute \
  --deselect tests/interop/test_frames.py::test_keep_alives_come_every_60_to_65_seconds
# Those that ask what all workers answer, without packets that may overtake the news of a login.
WORKERS_INTEROP := $(patsubst %,tests/interop/test_%.py,client changes debug tls) -k "not stock"
# pytest's own options, e.g. make test-unit ARGS="-k stun"
ARGS ?=

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# -- set-up

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON to one."; exit 2; }
	@echo "==> venv: installing the pinned packages into $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 2; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@DERPER_NO_EXTENSIONS=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

venv: $(VENV)/.ready ## .venv with derper, derp-operator and the test tools; hot modules compiled if there is a C compiler
	@$(RUN) dev.extensions build

lock: venv ## requirements.txt anew from pyproject.toml
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --all-extras --python-version 3.11 pyproject.toml -o requirements.txt
	@$(BIN)/pip uninstall --quiet --yes uv

# -- use

demo: venv ## a Kubernetes cluster with the operator and a region of three relays
	@$(RUN) dev.demo up

demo-down: venv ## end what make demo started, and leave nothing behind
	@$(RUN) dev.demo down

kubeconfig: $(VENV)/.ready ## the path of the demo cluster's kubeconfig (make -s kubeconfig)
	@$(RUN) dev.demo kubeconfig

region: venv ## a region of three relays on this machine, without a cluster
	@$(BIN)/derper region

images: venv ## the container images of relay and operator
	@$(RUN) dev.cluster images

# -- check

lint: venv ## ruff, mypy --strict, import contracts, compiled modules, chart and CRD
	@echo "==> lint: ruff"; $(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@echo "==> lint: mypy --strict"; $(BIN)/mypy
	@echo "==> lint: import contracts"; $(BIN)/lint-imports --no-cache | grep -vE '[╔╗║╚▶◀▲]|└|^$$'
	@echo "==> lint: the chart's CRD and docs/api.md are those of crds/"; $(RUN) dev.chart check && $(RUN) dev.apidoc check
	@echo "==> lint: one source and its types for each compiled module"; $(RUN) dev.extensions check
	@echo "==> lint: docs/parity.md is tests/interop/parity/"; $(RUN) dev.parity check

test: lint test-unit test-pure test-fuzz test-hostile test-interop test-workers test-api test-e2e ## everything

test-unit: venv ## Python only, about a minute; compiled modules as built
	@echo "==> unit tests"; $(BIN)/pytest tests/unit $(ARGS)

test-pure: venv ## the unit tests, and those of the data path with stock derper, without compiled modules (needs Go)
	@echo "==> tests without compiled modules"; DERPER_NO_EXTENSIONS=1 $(BIN)/pytest tests/unit $(PURE_INTEROP) $(ARGS)

test-fuzz: venv ## every fuzz target with a few thousand inputs (Linux on x86-64; skipped elsewhere)
	@echo "==> fuzz targets, the same five thousand inputs each"; $(RUN) tests.fuzz run --runs 5000

fuzz: venv ## parsers against hostile bytes, e.g. make fuzz ARGS="frames head --seconds 600"
	@$(RUN) tests.fuzz run $(ARGS)

test-hostile: venv ## a relay under attack (Linux, about a minute)
	@echo "==> a relay under attack, and what is left of it"; $(BIN)/pytest tests/hostile -m "not slow" $(ARGS)

test-slow: venv ## the long ones: 10,000 clients at a time and one after another (Linux, about five minutes)
	@echo "==> ten thousand clients"; $(BIN)/pytest tests/hostile -m slow -s $(ARGS)

test-interop: venv ## stock derper and real Tailscale clients (needs Go)
	@echo "==> interop tests, with stock derper and real clients"; $(BIN)/pytest tests/interop $(ARGS)

test-workers: venv ## some of them again, with two workers in our relays (needs Go)
	@echo "==> interop tests, with two workers"; DERPER_TEST_WORKERS=2 $(BIN)/pytest $(WORKERS_INTEROP) $(ARGS)

test-api: venv ## a real kube-apiserver (needs Go)
	@echo "==> API tests, with a real kube-apiserver"; $(BIN)/pytest tests/api $(ARGS)

test-e2e: venv ## the embedded cluster (needs Go, root and Linux)
	@echo "==> end-to-end tests, on a real cluster"; $(BIN)/pytest tests/e2e -m "not faults" $(ARGS)

test-faults: venv ## faults and changes of a cluster that take long, about ten minutes (as test-e2e)
	@echo "==> faults and slow changes, on a real cluster"; $(BIN)/pytest tests/e2e -m faults $(ARGS)

tables: venv ## the tables of docs/changes.md, from what the last end-to-end tests noted
	@$(RUN) tests.e2e.ledger

bench: venv ## packets per second and more, against stock derper in the same run (about half an hour; ARGS=--quick: 3 minutes; ARGS=--resume goes on)
	@$(RUN) bench $(ARGS)

bench-scale: venv ## 9 nodes with 20,000 clients: the mesh's control plane, against stock derper (about five minutes)
	@$(RUN) bench.scale $(ARGS)

.PHONY: help venv lock demo demo-down kubeconfig region images lint test test-unit test-pure test-fuzz fuzz test-hostile test-slow test-interop test-workers test-api test-e2e test-faults tables bench bench-scale
