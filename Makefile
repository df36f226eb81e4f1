# Sets itself up: `make run` and `make test` make .venv if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test lint bench clean

run: $(INSTALLED)
	$(BIN)/python experiments/local_launch.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/predictors_and_sources.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache *.egg-info

# Works where ensurepip is missing: the outer pip installs into the new
# environment.
$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install -r requirements.txt
	touch $@
