# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11 and a C++ compiler.
# Where the torch pin would fetch CUDA, name a CPU wheel index:  make test TORCH_INDEX=<url of a CPU wheel index>
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INDEX ?=
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= 2
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS = $(VENV)/constraints-$(TORCH).txt

.PHONY: help demo test test-all test-torch gpu bench lint clean coverage
help:            ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(CONSTRAINTS): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -e 's/^torch==.*/torch==$(TORCH)/' $(if $(filter-out 2.13.0,$(TORCH)),-e '/^triton==/d') constraints.txt > $@.tmp
	$(PIP) -c $@.tmp $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	mv $@.tmp $@

$(VENV)/.demo: $(CONSTRAINTS)
	$(PIP) -c $(CONSTRAINTS) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(CONSTRAINTS)
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo   ## The main job on real weights and text: table, picture, HTML report
	$(BIN)/eff demo $(ARGS)

lint: $(VENV)/.dev    ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint            ## Everything CI runs: 18 minutes on two cores of a recent server, up to 30 on a slow one
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(JOBS)

test-all: lint        ## The model matrix through TorchInductor as well
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS)

test-torch:           ## The same tests on another torch: make test-torch TORCH=2.15.0
	$(MAKE) test VENV=.venv-$(TORCH) TORCH=$(TORCH)

# A GPU machine may reach no package index: the interpreter that is there will do, if it has torch, Triton and pytest.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:                  ## What needs a GPU: correctness, then kernels against their peers; 20 minutes, JSON into bench/results
	$(GPU_PYTHON) -m pytest -m gpu -rs -p no:cacheprovider tests/gpu
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(GPU_PYTHON) -m effcompile bench gpu-attention gpu-decode gpu-moe gpu-dit --device cuda $(ARGS); \
	else echo "gpu-attention, gpu-decode, gpu-moe and gpu-dit skipped: torch sees no CUDA device"; fi

bench: $(VENV)/.dev   ## Every case against its peers, interleaved; JSON into bench/results
	$(BIN)/eff bench $(ARGS)

clean:                ## Remove build products, keep the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out
