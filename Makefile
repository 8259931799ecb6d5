# make quickstart   two circuits of one task, audited, in one table   (make quickstart SEED=1 for another seed)
# make test         the tests
# make docs         the documentation as a site, in site/
# make notebooks    the notebooks again, with their outputs
# make lint, make typecheck, make clean
# Needs Python 3.11 or newer, git, make and a compiler; everything else goes into .venv, once.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
SEED   ?= 0

.PHONY: help setup quickstart test docs notebooks lint typecheck clean

help:
	@sed -n 's/^# //p' Makefile

setup: $(STAMP)

# A .venv that is already there is used as it is; one left half made is completed.
$(STAMP): pyproject.toml constraints.txt
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "pdprune needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "Installing pdprune and its pinned requirements into $(VENV) (once; PyTorch is large) ..."
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

quickstart: $(STAMP)
	@$(RUN) -m pdprune.train fit --overwrite --config configs/quickstart.yaml --seed_everything $(SEED)
	@$(RUN) -m pdprune.train fit --overwrite --config configs/quickstart.yaml \
	  --config configs/quickstart-complete.yaml --seed_everything $(SEED)
	@$(RUN) -m pdprune.compare runs/quickstart-complete runs/quickstart
	@echo "Look into the circuits: runs/quickstart/report.html, runs/quickstart-complete/report.html"

test: $(STAMP)
	@$(RUN) -m pytest -n 2 --dist loadfile

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

notebooks: $(STAMP)
	@$(RUN) docs/run_notebooks.py

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

typecheck: $(STAMP)
	@$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
