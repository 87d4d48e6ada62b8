# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev demo quickstart test test-slow gpu-check lint format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

venv: $(VENV)/installed  ## Create .venv from requirements.txt

venv-dev: $(VENV)/installed-dev  ## Add what tests, style and ONNX export need (requirements-dev.txt)

QUICKSTART_WORDS := data/quickstart/images

$(QUICKSTART_WORDS)/train: | venv
	$(BIN)/python tools/render_words.py --config configs/quickstart_render.yaml --output data/quickstart --name train --count 17000 --seed 0

$(QUICKSTART_WORDS)/test: | venv
	$(BIN)/python tools/render_words.py --config configs/quickstart_render.yaml --output data/quickstart --name test --count 1000 --seed 1

quickstart: venv $(QUICKSTART_WORDS)/train $(QUICKSTART_WORDS)/test  ## Render words, train the smallest BINet on the CPU (minutes), evaluate it
	$(BIN)/python main.py --config=configs/quickstart.yaml
	$(BIN)/python main.py --config=configs/quickstart.yaml --phase test
	@echo "weights, log, TensorBoard events, predictions, attention and mask images: workdir/quickstart"

demo: venv  ## Read the images in fig/demo with the weights of the repository; writes a page that shows how
	$(BIN)/python demo.py --input fig/demo --precision fp32 --html workdir/demo/index.html

test: venv-dev  ## Run the tests (CPU, under 10 minutes)
	$(BIN)/python -m pytest

test-slow: venv-dev  ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow

gpu-check: venv-dev  ## Check losses, resume and speed on this machine's GPU (under 8 minutes); writes gpu-check.md
	$(BIN)/python tools/gpu_check.py

lint: venv-dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv-dev  ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches, but no work folder
	rm -rf $(VENV) .pytest_cache .ruff_cache
