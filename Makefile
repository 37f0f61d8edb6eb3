# Everything runs in .venv, made by the first target that needs it. A stamp in it remembers what was installed,
# so that a second run installs nothing until pyproject.toml or constraints.txt changes.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
UV ?= uv
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-compile -c constraints.txt
# pip compiles on one core, which takes as long as all the rest. Some packages hold files that are no Python.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
.DEFAULT_GOAL := help
.PHONY: help demo demo-prefect test drill lint check constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | column -t -s ':' 2>/dev/null || grep '##' Makefile

demo: $(VENV)/.demo  ## install what the sample batch needs, and render it
	$(BIN)/avatar render data/samples/batch.csv
	@echo "The same on a Prefect server, with its graph and the queues of two pretended GPUs: make demo-prefect"

demo-prefect: $(VENV)/.demo-prefect  ## render samples on a Prefect server's queues of two pretended GPUs
	$(BIN)/python -P -m flows.demo

test: $(VENV)/.dev  ## run the tests, but for the long drills
	$(BIN)/python -m pytest -m "not drill"

drill: $(VENV)/.dev  ## run the long drills: kills, real servers, large tables, fresh environments
	$(BIN)/python -m pytest -m drill

# What mypy makes of a join of types can hang on the order of its sets: one order for everybody.
lint: $(VENV)/.dev  ## ruff, mypy and the import contracts, without the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYTHONHASHSEED=0 $(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint test drill  ## everything that must pass before a commit

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "Installing the preview backend into $(VENV) ..."
	@$(INSTALL) -e '.[preview]'
	@$(COMPILE)
	@touch $@

$(VENV)/.demo-prefect: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "Installing a backend with a neural network, and PostgreSQL, into $(VENV) (some GB, for torch) ..."
	@$(INSTALL) -e '.[preview,hunyuan,postgres]'
	@$(COMPILE)
	@touch $(VENV)/.demo $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "Installing everything that the tests need into $(VENV) ..."
	@$(INSTALL) -e '.[preview,hunyuan,ditto,multitalk,tts,s3,postgres,dev]'
	@$(COMPILE)
	@touch $(VENV)/.demo $(VENV)/.demo-prefect $@

# An environment without pip is one whose creation was cut short: it is made again.
define make-venv
$(BIN)/python -m pip --version >/dev/null 2>&1 && exit 0; \
for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
  echo "Making $(VENV) with $$($$python --version) ..."; \
  $$python -m venv --clear $(VENV); exit; \
done; \
echo "No Python 3.11 or newer with its venv module was found as python3, python3.13, python3.12 or python3.11." >&2; \
echo "Install one (Debian, Ubuntu: apt-get install python3-venv) and run make again." >&2; \
exit 1
endef

constraints:  ## compile constraints.txt again (needs uv); UPGRADE=--upgrade takes the newest versions
	$(UV) pip compile pyproject.toml --universal --python-version 3.11 --all-extras $(UPGRADE) \
	  --no-header --no-annotate --no-emit-index-url --quiet --output-file constraints.txt
	@sed -i '1i # Made by `make constraints`: every extra, Python 3.11 and newer.' constraints.txt

clean:  ## remove the environment, caches and build results; the store and the weights stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
