# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up what they use.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FEDGE_DATA ?=
export FEDGE_DATA

.PHONY: help demo test check format clean
.DELETE_ON_ERROR:

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Run a whole federation on this machine: broker, server, 3 agents, ONNX, inference
	@$(BIN)/aggregator demo

test: $(VENV)/.installed-dev mosquitto  ## Run all tests (installs mosquitto, a Debian package, if it is missing)
	$(BIN)/pytest -n auto

check: $(VENV)/.installed-dev  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment, caches and the demo's folder
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build fedge-demo

.PHONY: mosquitto
mosquitto:
	@PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	  echo "installing mosquitto, the broker that the tests run against"; \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq mosquitto; }

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[aggregator]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed
