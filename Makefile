# Sets itself up: `make run` and `make test` make .venv if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Folder of the sweep whose networks are studied.
SWEEP_DIR ?= runs/sweeps/small

.PHONY: run test test-slow lint bench sweep results clean

# Fresh buffers in huge pages (Linux): most of their cost is page faults.
run: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
run: $(INSTALLED)
	$(BIN)/python experiments/local_launch.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Time to Bayes comes last, and takes hours; its file has what was done so far.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/sweep_throughput.py)
	$(if $(ARGS),,$(BIN)/python benchmarks/time_to_bayes.py)

# Trains what is not finished, as many runs at once as there are cores.
sweep: $(INSTALLED)
	$(BIN)/python experiments/sweeps/launch.py $(ARGS)

# Tables and figures from the runs of the sweep; without them, figures from the
# committed tables.
results: $(INSTALLED)
	$(BIN)/python experiments/analysis/report.py --sweep_dir=$(SWEEP_DIR) \
	  $(if $(wildcard $(SWEEP_DIR)/sweep.json),,--draw_only) $(ARGS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache *.egg-info

# Works where ensurepip is missing: the outer pip installs into the new
# environment.
$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install -r requirements.txt
	touch $@
