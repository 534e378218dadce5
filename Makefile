# The two commands of the README, and what a contributor runs. Everything is installed in $(VENV), nothing outside it.
#   make demo PYTHON=python3.12                                         with another interpreter
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu          without CUDA's libraries (about 3 GB less)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH_VARIANT ?= cpu
PYTEST_FLAGS ?= --numprocesses auto --maxprocesses 4 --dist worksteal

BIN := $(VENV)/bin
CHECK_VERSION := import sys; sys.version_info >= (3, 11) or sys.exit( \
    "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])

# litdata asks for torchvision but needs it for images only, and beside a torch of another build it breaks `import lightning`.
define install
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --editable '$(1)'
	$(BIN)/pip uninstall --disable-pip-version-check --yes torchvision
	touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help demo install dev test lint dist dist-check docs lock image-check clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | expand -t 14

demo: install  ## Install, then train the demo on this machine
	$(BIN)/muse fit --config recipes/demo.yaml

install: $(VENV)/.installed  ## Create the environment and install the project in it, editable

dev: $(VENV)/.installed-dev  ## The same with the tools that tests need

$(VENV)/bin/python:
	@$(PYTHON) -c '$(CHECK_VERSION)'
	$(PYTHON) -m venv $(VENV)

# Torch first, so that its index serves torch alone.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(call install,.)

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call install,.[dev])

lint: dev  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Lint, then the tests that run anywhere; PYTEST_FLAGS replaces how
	$(BIN)/pytest $(PYTEST_FLAGS)

dist: dev  ## Build the wheel and the sdist into dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

dist-check: dist  ## Install them into a clean environment and train the demo from what is installed
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' tools/check_dist.sh dist

docs: dev  ## Build the documentation as a site into build/site and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/linkchecker --config .linkcheckerrc --no-status build/site/index.html

lock:  ## Write the container image's locks from constraints.txt; needs uv
	tools/lock.sh

image-check:  ## Build the container image twice and run it, without an engine; as root, see tools/image_check.sh
	tools/image_check.sh $(TORCH_VARIANT)

clean:  ## Remove the environment, caches and built files; runs/ and data/ stay
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
