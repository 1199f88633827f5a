# `make quickstart` runs the program and `make test` the tests; both do all of their own set-up.

BIN := .venv/bin
DATA := data/word_problems
MODEL := models/SmolLM2-135M-Instruct
# Its pins fight with this project's: an environment of its own.
FLWR := flwr==1.42.0

# The first that runs and is recent enough; `make PYTHON=...` names another.
PYTHONS := $(BIN)/python python3 python3.11 python3.12 python3.13 python3.14 python3.10
PYTHON ?= $(shell for python in $(PYTHONS); do \
  if $$python -Ic '$(IS_RECENT)' >/dev/null 2>&1; then echo $$python; break; fi; done)
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(CXX))

# Another environment must not leak in from the caller, and compiled ops look for ninja on PATH.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install check model flower quickstart federation test test-all test-lowest gpu gpus lint docs bench clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: .venv/.installed  ## Make .venv with the pinned packages
.venv/.installed: pyproject.toml constraints.txt | check
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,gguf,tasks]'
	@touch $@

model: install  ## Bring SmolLM2-135M-Instruct into models/
	$(BIN)/python launch/fetch_model.py --out $(MODEL)

quickstart: install model  ## Three clients, one round, from a pretrained model to a score
	$(BIN)/python -m fedex_scale.data.word_problems --out $(DATA)
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml \
	  launch/instruct.py --config launch/quickstart.yaml

flower: .flower/.installed  ## Make .flower, an environment of its own with Flower (Python 3.11)
.flower/.installed: Makefile | check
	$(PYTHON) -m venv --clear .flower
	.flower/bin/python -m pip install --quiet $(FLWR)
	@touch $@

federation: install model flower  ## Three real sites over Flower and TLS, one round, scored
	$(BIN)/python launch/federation.py --flower .flower/bin

test: install  ## Run the tests; those that need the model are skipped where it cannot be had
	-@$(BIN)/python launch/fetch_model.py --out $(MODEL)
	-@$(MAKE) --no-print-directory flower
	$(BIN)/python -m pytest tests -m "not slow"

test-all: install model flower  ## Run the slow tests as well
	$(BIN)/python -m pytest tests

test-lowest: .lowest/.installed  ## Import all and do a run with every dependency at its lower bound
	.lowest/bin/python -m pytest tests/unit/test_imports.py tests/unit/config tests/unit/data \
	  tests/e2e/test_trackers.py
.lowest/.installed: pyproject.toml tests/lowest.py | install
	$(PYTHON) -m venv --clear .lowest
	$(BIN)/python tests/lowest.py > .lowest/requirements.txt
	.lowest/bin/python -m pip install --quiet --requirement .lowest/requirements.txt
	.lowest/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

gpu: install  ## On a card's first day: the tests of one card, at most 9 minutes
	$(BIN)/python -m pytest tests/gpu -m gpu --durations=10

gpus: install  ## The same on two cards
	FEDEX_SCALE_CARDS=2 $(BIN)/python -m pytest tests/gpu -m gpu --durations=10

lint: install  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install  ## Build docs/ as a site in site/, broken links being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: install model  ## Run every benchmark, one after another
	set -e; for file in $(filter-out %/common.py %/files.py %/methods.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

clean:  ## Remove .venv and caches; models, data and runs stay
	rm -rf .venv .flower .lowest build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# What an installation needs of the machine; $(error) ends in one line, before anything is made.
require = $(if $(shell $(1) >/dev/null 2>&1 && echo yes),,$(error $(2)))
check:
	@$(call require,$(or $(PYTHON),false) -Ic '$(IS_RECENT)',$(NO_PYTHON))
	@$(call require,$(PYTHON) -Ic '$(HAS_VENV)',$(NO_VENV))
	@$(call require,$(PYTHON) -Ic '$(HAS_HEADERS)',$(NO_HEADERS))
	@$(call require,command -v $(COMPILER),$(NO_COMPILER))

IS_RECENT := import sys; sys.exit(sys.hexversion < 0x30a0000)
HAS_VENV := import ensurepip; import venv
HAS_HEADERS := import sysconfig; open(sysconfig.get_path("include") + "/Python.h").close()

NO_PYTHON = Python: expected 3.10 or newer, got \
  $(or $(shell $(or $(PYTHON),python3) --version 2>/dev/null || true),none); install one \
  (apt-get install python3.11 python3.11-venv) or name one (make PYTHON=/path/to/python3)
NO_VENV = Python: expected $(PYTHON) with the venv module, got none; \
  install it (apt-get install python3-venv)
NO_HEADERS = Python headers: expected Python.h of $(PYTHON), which DeepSpeed compiles with, got \
  none; install them (apt-get install python3-dev)
NO_COMPILER = C++ compiler: expected $(COMPILER) on PATH, got none; install one \
  (apt-get install g++) or name one (make CXX=/path/to/g++)
