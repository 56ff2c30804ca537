# `make` prints this list. Every target that needs the environment makes it first (once; tools/setup_env.py says what it does).
.DEFAULT_GOAL := help
.PHONY: help env demo test lab pair bench bench-extract bench-train bench-metrics bench-explorer check unit nb-check nb-test nb-refresh lock hooks

PYTHON  ?= python3
XSD     := .venv/bin/xsd
JOBS    ?= 2
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
NBVAL     := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600 -p no:cacheprovider
# One thread for each test worker, and no progress bars or hub look-ups, so that outputs are the same everywhere.
QUIET   := OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' Makefile | sed -E 's/:[^#]*##/ :/' | awk -F ' : ' '{printf "  make %-12s %s\n", $$1, $$2}'

env:             ## .venv with everything pinned (the other targets call it)
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is not on the PATH; install Python 3.11 or newer and run make again"; exit 1; }
	@$(PYTHON) tools/setup_env.py

demo: env        ## the main job on the embedded pair (PAIR=smollm2: on that one); the report is reports/demo/index.html
	@$(XSD) demo $(if $(PAIR),--profile $(PAIR) -o reports/$(PAIR))

test: env nb-check unit nb-test   ## everything that is checked: lint, unit tests, notebooks re-run and compared

lab: env         ## JupyterLab in notebooks/
	@.venv/bin/jupyter lab --notebook-dir=notebooks

pair: env        ## train the embedded pair again (resumes where it stopped)
	@$(XSD) pair train

bench: env       ## live arms against each other, interleaved, as ratios of one run: reports/bench
	@$(XSD) run 05 -p run_dir=runs/bench -p n_samples=20 -p repeats=3 -p max_new_tokens=64 -p threads=2 -o reports/bench \
	  -p arms=ar,ar_all_cores,hf_generate,hf_static,hf_prompt_lookup@8,drafter,ngram,L1,L4,B1,L1+L5F,data/adapters/D1@5,data/adapters/D1@8

bench-extract: env  ## extraction and shards against the plain ways: reports/bench_extract
	@$(XSD) bench extract

bench-train: env    ## the trainer against bare forward and backward: reports/bench_train
	@$(XSD) bench train

bench-metrics: env  ## metric kernels against a bare read and a plain loop: reports/bench_metrics
	@$(XSD) bench metrics

bench-explorer: env ## what each control of the explorer costs at 11 000 answers: reports/bench_explorer
	@$(XSD) bench explorer

check: env       ## seconds: lint, layers, house rules, notebook hygiene
	@.venv/bin/ruff check .
	@$(QUIET) .venv/bin/python -m pytest -q tests/test_layers.py tests/test_house.py
	@$(MAKE) --no-print-directory nb-check

unit: env        ## unit tests
	@echo "test: lint"
	@.venv/bin/ruff check .
	@echo "test: unit tests on $(JOBS) workers"
	@$(QUIET) .venv/bin/python -m pytest -q -n $(JOBS) --dist loadfile tests

nb-check: env    ## notebook hygiene, nothing executed
	@echo "test: notebook hygiene"
	@$(XSD) notebooks check

nb-test: env     ## run every notebook and compare the golden cells (nbval); starts from an empty runs/smoke
	@rm -rf runs/smoke
	@echo "test: $(words $(NOTEBOOKS)) notebooks, re-run and compared"
	@$(if $(NOTEBOOKS),$(QUIET) .venv/bin/python -m pytest -q $(NBVAL) $(NOTEBOOKS),echo "test: notebooks/ is empty")

nb-refresh: env  ## run every notebook and store its outputs; read the diff afterwards
	@rm -rf runs/smoke
	@$(QUIET) $(XSD) notebooks refresh

lock: env        ## write constraints.txt from what is installed in .venv
	@$(PYTHON) tools/setup_env.py --lock

hooks: env       ## run lint and house rules before each commit
	@.venv/bin/pre-commit install
