# `make` lists the targets. Each one sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes; the tests of a file stay together, since they share what a fixture has trained.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help install demo test test-all test-lowest lint types docs dist clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the project and what the demo and the tests need

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## fine-tune the bundled model plain and guarded, and show what they copy: runs/demo/
	$(BIN)/sd-memguard demo

test: $(INSTALLED) ## run the everyday tests: every behavior once
	$(PYTEST) -m 'not slow'

test-all: $(INSTALLED) ## run all tests, also the slow ones: kills, processes, fuzzing, a browser
	$(PYTEST)

test-lowest: ## run the everyday tests with the lowest versions that are declared, in an environment of its own
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[test]' --constraint tools/lowest-versions.txt
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m 'not slow'

lint: $(INSTALLED) ## check style
	$(BIN)/ruff check .

types: $(INSTALLED) ## check types
	$(BIN)/mypy

docs: $(INSTALLED) ## build the documentation site: site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(INSTALLED) ## build wheel and source archive into dist/, and run the demo from the wheel in a clean environment
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tools/check_distribution.py dist

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-lowest build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
