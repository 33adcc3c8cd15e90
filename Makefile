# The two commands: make quickstart, make test. `make help` lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: .venv/installed ## the whole pipeline on real text, in minutes
	$(BIN)/python -m pipeline job=quickstart

test: check .venv/installed-dev ## lint, types and tests, in minutes; ALL=1, as in CI: the slow ones too
	$(BIN)/pytest -n 2 --dist loadgroup $(if $(ALL),,-m "not slow")

check: .venv/installed-dev ## lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fix: .venv/installed-dev ## mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

size: ## lines of code by folder
	@for d in pipeline pipeline/* tests; do [ -d $$d ] && printf '%7d  %s\n' \
		"$$(find $$d -name '*.py' -exec cat {} + | wc -l)" $$d; done; true

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing into .venv (about 1.6 GB, a minute or two)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "installing into .venv (about 1.6 GB, a minute or two)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/installed

.PHONY: help quickstart test check fix size
