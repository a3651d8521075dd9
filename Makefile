# Every target sets up what it needs in .venv and says what it does. `make` alone lists them.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_DATA := datasets/glyphs
DEMO_RUN := runs/demo
# Two workers on a machine without GPUs share its cores; one thread each is the fastest there.
DEMO_WORKERS ?= 2
# Test files that run at the same time. Each test may start up to five processes of its own.
TEST_PROCESSES ?= 2

.PHONY: help setup demo tune test test-slow browser lint format ui bench clean

help:
	@echo "make setup      install dist_dml and everything it needs into $(VENV) (about 3 minutes)"
	@echo "make demo       pack glyphs, train with 2 deepspeed workers, score unseen classes"
	@echo "make tune       search 8 settings on glyphs, confirm the best over 3 seeds (8 minutes)"
	@echo "make test       the tests (under 10 minutes on 2 cores)"
	@echo "make test-slow  faults, killed workers and the documented commands, end to end"
	@echo "make browser    install chromium by apt, for the tests in a browser (else skipped)"
	@echo "make lint       ruff (format, check) and pyright"
	@echo "make ui         the MLflow UI over the runs in runs/"
	@echo "make bench      time the class-parallel head against PyTorch's own, and all losses"
	@echo "make clean      remove $(VENV), runs/ and datasets/"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== setup: dist_dml and its dependencies into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dist_dml needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[all]'
	@# Bytecode, by all cores where pip takes one. Where nobody may write it later (another user's
	@# environment, PYTHONDONTWRITEBYTECODE) each worker would compile what it imports: 10 to 60 s.
	@# Files that no Python of this version can read are left out by themselves.
	-@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/testing/_internal/|/ray/rllib/' \
		dist_dml tests tools $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	@touch $@

demo: $(READY)
	@echo "== demo 1/3: draw characters of the installed typefaces into WebDataset shards"
	$(BIN)/dist-dml pack glyphs $(DEMO_DATA)
	@echo "== demo 2/3: train with $(DEMO_WORKERS) workers, each owning a share of the classes"
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/deepspeed --num_accelerators $(DEMO_WORKERS) \
		dist_dml/train.py --config configs/demo.yaml --resume auto
	@echo "== demo 3/3: scores on classes never seen in training"
	$(BIN)/dist-dml evaluate $(DEMO_RUN) --baselines
	@$(BIN)/dist-dml track sync $(DEMO_RUN) >/dev/null
	@echo "look at it:  make ui"

tune: $(READY)
	@echo "== tune 1/2: draw characters of the installed typefaces into WebDataset shards"
	$(BIN)/dist-dml pack glyphs $(DEMO_DATA)
	@echo "== tune 2/2: 8 trials, then the best beside the default over 3 seeds"
	$(BIN)/dist-dml tune --search configs/search/glyphs.yaml --config configs/glyphs_tune.yaml
	@echo "look at it:  make ui"

test: $(READY)
	@echo "== test: everything but the slow tests"
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --durations=15

test-slow: $(READY)
	@echo "== test-slow: several processes, injected faults, documented commands"
	$(BIN)/python -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15

browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)

lint: $(READY)
	@echo "== lint: ruff and pyright"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(READY)
	@echo "== ui: MLflow over the runs in runs/"
	$(BIN)/dist-dml ui --root runs

bench: $(READY)
	@echo "== bench: the class-parallel head against its peers and the machine's own rates, with verdicts"
	$(BIN)/python tools/bench_head.py
	@echo "== bench: time, memory and error of every loss, as ratios to cross-entropy"
	$(BIN)/python tools/bench_losses.py

clean:
	rm -rf $(VENV) runs datasets
