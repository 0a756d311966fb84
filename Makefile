# make reproduce   environment, default model, every notebook at its defaults, the book rendered from them
# make test        environment, the tests
# make book        the published report, rendered from the stored pages
# make report      re-run the stale rows of the report (hours; needs the data sets)
# make bench       speed of the importance pass, reconstruction, and scoring blocks, growth of cost
# make lint        style and types

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
export PRUNING_CACHE ?= $(CURDIR)/data/cache

.PHONY: test reproduce book report bench lint
.DELETE_ON_ERROR:

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

reproduce: $(READY)
	$(BIN)/pruning-lib run --defaults --out build/reproduce
	$(BIN)/pruning-lib book --out build/reproduce

book: $(READY)
	$(BIN)/pruning-lib book

report: $(READY)
	$(BIN)/pruning-lib run --all --stale

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench_importance.py
	$(BIN)/python tests/benchmarks/bench_reconstruction.py
	$(BIN)/python tests/benchmarks/bench_consensus.py
	$(BIN)/python tests/benchmarks/bench_growth.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer wanted; name one: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@
