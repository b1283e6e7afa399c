# Two commands: `make demo` trains a small model and says what to look at; `make test` runs every test.
# Both set up what they need in .venv, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format docs clean help

help:
	@echo "make demo   set up, and train a small language model on real text (offline, some minutes)"
	@echo "make test   run every test"
	@echo "make check  format, lint, types and the fast tests (about a minute)"

demo: .venv/.demo
	$(BIN)/pico train configs/demo.yaml
	$(BIN)/pico analyze configs/analyses/demo.yaml --run runs/demo

test: .venv/.dev
	$(BIN)/pytest -n 2 --dist worksteal

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pico needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

# constraints.txt holds the versions that were tested together; pyproject.toml says which others may do.
.venv/.%: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@
