# Thin entry points; everything happens in a virtual environment of our own, which is made when it is needed.
#
#   make demo     two copies of a real server side by side
#   make test     the test suite; PYTEST=... adds options, such as PYTEST='-k guard'
#   make check    ruff, ruff format, mypy
#   make bench    the benchmarks, which print tables and assert nothing

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
BIN = $(VENV)/bin
READY = $(VENV)/ready

# Of hundreds of processes that import portexec, none is to compile it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check format bench clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	for script in scripts/bench_*.py; do $(BIN)/python $$script || exit; done

# An unfinished environment has no `ready` and is made again.
$(READY): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,servers,check]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
