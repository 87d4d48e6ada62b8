# `make help` lists what can be made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow lint format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

venv: $(VENV)/installed  ## Make .venv from requirements.txt

quickstart: venv  ## Render words, train the small BINet on the CPU, evaluate it, show where the results are
	$(BIN)/python tools/quickstart.py

test: venv  ## Run the tests (CPU, a few minutes)
	$(BIN)/python -m pytest

test-slow: venv  ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow

lint: venv  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches; work folders stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
