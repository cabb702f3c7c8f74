# The tasks of the project. Each makes .venv and installs what it needs, pinned by constraints.txt.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEPS := settings.ini setup.py pyproject.toml constraints.txt
SHELL := /bin/bash
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MPLBACKEND := agg

define step
@printf '\n== %s ==\n' "$(1)"
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help compare gpu test notebooks style docs readme constraints clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

compare: $(VENV)/.runtime ## Compare methods on the embedded data; options: make compare ARGS="--help"
	@phantom_nb compare $(ARGS)

gpu: $(VENV)/.runtime ## Run what waits for a GPU, in pieces that resume; says so where there is none
	@phantom_nb gpu $(ARGS)

test: $(VENV)/.dev notebooks style docs ## Run everything: notebooks, style, docs site, and pytest last
	$(call step,pytest)
	@SITE=_docs OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not processes'
	@SITE=_docs python -m pytest -m processes

notebooks: $(VENV)/.dev ## Run every notebook as a test, two at a time
	$(call step,notebooks)
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning nbdev-test --n-workers 2 --timing

style: $(VENV)/.dev ## Check the style of notebooks and tests
	$(call step,style)
	@chkstyle nbs tests --show-rule

docs: $(VENV)/.dev ## Build the docs site into _docs; a broken link is an error
	$(call step,docs site)
	@python -W ignore tests/docs.py

readme: $(VENV)/.dev ## Make README.md and its like from their pages
	@python tests/readme.py
	@python tests/toplevel.py

constraints: $(VENV)/.dev ## Pin what is installed now in constraints.txt
	@{ sed -n '/^#/p' constraints.txt; python -m pip freeze --exclude-editable | grep '=='; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

clean: ## Remove everything that the other tasks made
	rm -rf $(VENV) _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find nbs phantom_nb tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp says that an installation of these requirements ended well.

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null || { echo "No $(PYTHON) here. Install Python 3.11 or newer, or say: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "phantom_nb needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Say: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.runtime: $(DEPS) | $(BIN)/python
	@echo "Installing what phantom_nb needs to run ..."
	@$(PIP) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(DEPS) | $(BIN)/python
	@echo "Installing what phantom_nb needs to run and to be tested ..."
	@$(PIP) -e '.[dev,cluster,tune,pretrained]' -c constraints.txt
	@touch $(VENV)/.runtime $@
