# The few commands people type. Each installs or builds what it needs and says what it is doing.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY ?= python3
VENV := .venv

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.ready: requirements.txt pyproject.toml
	@echo "==> venv: installing the pinned packages into $(VENV)"
	@$(PY) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

venv: $(VENV)/.ready ## .venv with derper, derp-operator and the test tools

.PHONY: help venv
