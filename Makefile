# `make demo` and `make test` each work as the first command in a fresh clone: Python >= 3.11 with venv, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two cores serve two test processes; more would only wait for each other.
WORKERS ?= 2
# Bytecode is kept, also in containers that switch it off: else each process of a run or of the tests compiles torch and
# Prefect again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo test test-s3 test-postgres test-browser test-slow test-faults test-attacks fuzz coverage mutation \
  bench-install bench docs lint format clean

help:            ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(READY)  ## virtual environment and pinned packages

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11: install Python 3.11 or set PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV), about a minute ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $(READY)

demo: $(READY)   ## the whole pipeline on scikit-learn's digits, about 2 minutes
	$(BIN)/functa run digits

test: $(READY)   ## all tests but the slow ones, those in a browser and those on a real S3 server
	$(BIN)/python -m pytest -n $(WORKERS) --durations 25 --durations-min 5 -m "not browser and not slow and not s3 and not postgres"

test-s3: $(READY)  ## the storage tests on a real S3 server: Ceph from Debian's packages, unpacked, not installed
	@$(BIN)/python -m tests.helpers.storage.ceph_packages
	$(BIN)/python -m pytest -m s3 tests/storage

test-postgres: $(READY)  ## the pipeline with Prefect's server on Postgres (installs Debian's where it may)
	$(BIN)/python -m pytest -m postgres

test-browser: $(READY)  ## the Prefect UI in a real browser (installs Debian's chromium where it may)
	$(BIN)/python -m pytest -m browser

test-slow: $(READY)  ## what takes minutes: real images, the benchmarks, the wheel, kills; before a release
	$(BIN)/python -m pytest -m "slow and not browser and not s3 and not postgres"

# The quick half of both runs in `make test` too: what bears the marker and is not slow. Tests of killed processes wait
# for leases and heartbeats most of their time, so that more of them than cores run at a time.
test-faults: $(READY)  ## kills, full disks, cut connections, clocks; FUNCTA_KILLS=N: as many random kills; FUNCTA_EVERY=1: each failpoint
	$(BIN)/python -m pytest -n $$((2 * $(WORKERS))) --durations 10 -m "faults and not browser and not s3 and not postgres"

test-attacks: $(READY)  ## hostile files, roots, requests and parameters; those in a browser run in test-browser
	$(BIN)/python -m pytest -n $(WORKERS) --durations 10 -m "attacks and not browser and not s3 and not postgres"

fuzz: $(READY)   ## the generated inputs of `make test`, many times as many: images, zarr metadata, records, YAML
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(WORKERS) --timeout 3600 -m fuzz

# Packages and the least percentage of their lines and branches.
COVERED := storage:95 models:95 tasks:85 flows:85

coverage: $(READY)  ## which lines and branches the quick tests and the faults reach, processes that they start included
	@mkdir -p build/coverage && $(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n $(WORKERS) --timeout 900 \
	  -m "not browser and not s3 and not postgres and (not slow or faults or attacks)"
	$(BIN)/coverage combine --quiet
	@failed=0; for each in $(COVERED); do \
	  $(BIN)/coverage report --include "$${each%:*}/*" --fail-under $${each#*:} || failed=1; done; exit $$failed

mutation: $(READY)  ## small faults in splits, quantiser, commit and gate, one at a time: which does no test notice?
	$(BIN)/python -m tests.mutation

$(VENV)/.bench: $(READY) requirements-bench.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r requirements-bench.lock
	@touch $@

bench-install: $(VENV)/.bench  ## the peers that the benchmarks run beside us

bench: $(VENV)/.bench  ## encoding, outer step and store beside their peers, about 10 minutes
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/meta.py
	$(BIN)/python benchmarks/store.py

docs: $(READY)   ## the documentation site, into build/docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(READY)   ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: $(READY) ## ruff's formatter
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean:           ## everything that can be made again, runs excepted
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
