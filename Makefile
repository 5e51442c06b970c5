# Thin entry points. Everything happens in a virtual environment of our own, which is made when it is needed; `make help` lists
# the targets. PYTHON makes the environment, VENV is its directory; PYTEST adds options, as in `make test PYTEST='-k guard'`.

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
# What is installed beside portexec, a group in pyproject.toml; `base` leaves out what the suites in tests/suites need.
DEPENDENCIES ?= dev
# Tests wait for processes a part of their time: with a worker for each core, a quarter of the cores was idle; with two, a tenth.
WORKERS ?= $(shell expr $$(nproc) \* 3)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
MADE = $(VENV)/pyvenv.cfg
READY = $(VENV)/ready
DEMO = $(VENV)/demo
PACKAGE = $(VENV)/package

# Of hundreds of processes that import portexec, none is to compile it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test recipes check format share pictures bench package clean
.DELETE_ON_ERROR:

help:                 ## show this
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# The demo needs less than the tests. Where all is there, that will do.
demo: $(if $(wildcard $(READY)),$(READY),$(DEMO)) ## two copies of a real server side by side
	@$(BIN)/python scripts/demo.py

# The last -m counts: PYTEST may have one of its own.
test: $(READY)        ## the test suite; PYTEST='-k guard' adds options
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not recipes' $(PYTEST)

recipes: $(READY)     ## the tests of the documentation, with the real tools
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m recipes $(PYTEST)

check: $(READY)       ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)      ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

share: $(READY)       ## write the manual and the completions anew
	$(BIN)/python scripts/make_share.py

pictures: $(READY)     ## draw the pictures of the documentation anew
	$(BIN)/python scripts/draw_pictures.py

bench: $(READY)       ## the benchmarks, which print tables and assert nothing
	for script in scripts/bench_*.py; do $(BIN)/python $$script || exit; done

package: $(PACKAGE)   ## build the wheel and the sdist in dist/, and try both
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	scripts/try_sdist.sh $(BIN)/python
	scripts/try_install.sh $(BIN)/python venv

clean:                ## remove the environment, and all that was made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

$(MADE):
	@echo "== making a virtual environment in $(VENV), once"
	@$(PYTHON) -m venv --clear $(VENV)

$(DEMO): pyproject.toml | $(MADE)
	@echo "== installing portexec and uvicorn there, once"
	@$(PIP) install --editable . uvicorn
	@touch $@

# Older pips know no dependency groups.
$(READY): pyproject.toml | $(MADE)
	@echo "== installing portexec there, and all that the tests need"
	@$(PIP) install --upgrade pip
	@$(PIP) install --editable . --group $(DEPENDENCIES)
	@touch $@

$(PACKAGE): $(READY)
	@$(PIP) install --group package
	@touch $@
