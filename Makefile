# make reproduce   environment, default model, every notebook at its defaults, the book rendered from them
# make test        environment, the tests
# make book        the published report, rendered from the stored pages
# make pdf epub    the chapters of that report as one file, in build/ (needs Chromium)
# make report      re-run the stale rows of the report (hours; needs the data sets)
# make bench       one table of speed: ours, a plain way, and the floor of this machine's arithmetic
# make gpu         what only a GPU can say, under ten minutes: speed of LLaMA-2-7B's shape, and the cost of scoring it
# make lint        style and types
# make compat      the tests of families, surgery and checkpoints with the oldest transformers, installed beside the newest

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# the notebook that `make reproduce` runs and shows first
FIRST := amp_prune
export PRUNING_CACHE ?= $(CURDIR)/data/cache

.PHONY: test reproduce book pdf epub report bench gpu lint compat
.DELETE_ON_ERROR:

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

reproduce: $(READY)
	rm -rf build/reproduce
	$(BIN)/pruning-lib run $(FIRST) --out build/reproduce
	$(BIN)/pruning-lib book --page $(FIRST) --out build/reproduce
	$(BIN)/pruning-lib run --defaults --stale -j 0 --out build/reproduce
	$(BIN)/pruning-lib book --out build/reproduce

book: $(READY)
	$(BIN)/pruning-lib book

pdf epub: $(READY)
	$(BIN)/pruning-lib book --$@ build/structured-pruning.$@

report: $(READY)
	$(BIN)/pruning-lib run --all --stale

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench.py

gpu: $(READY)
	$(BIN)/python tests/benchmarks/bench_gpu.py
	$(BIN)/pruning-lib run --stale speed-llama-2-7b-graphs scoring-cost-llama-2-7b

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# tests/models/test_portable.py then has each version read what the other one saved
compat: $(READY) build/compat/ready
	PYTHONPATH=build/compat $(BIN)/python -m pytest -n 2 --dist loadfile tests/models/test_portable.py \
	    tests/models/test_families.py tests/models/test_surgery.py tests/models/test_surgery_blocks.py tests/models/test_checkpoints.py

# an older transformers with the two packages it does not share with the newer one, and no second torch
build/compat/ready: Makefile
	$(BIN)/pip install --upgrade --no-deps --target build/compat 'transformers==4.56.*' 'huggingface-hub>=0.34,<1' 'tokenizers>=0.22,<=0.23.0'
	touch $@

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer wanted; name one: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@
