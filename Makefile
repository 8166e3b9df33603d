# The front door. Every target does the set-up it needs, once, in .venv; on a machine whose PYTHON already has a torch
# that sees a GPU, that interpreter is used as it is, and nothing is downloaded.

PYTHON ?= python3
VENV   := .venv
OPS    ?=
ARGS   ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# $$(BUILT) is expanded only for the target that is made.
.SECONDEXPANSION:
.PHONY: help install demo test bench gpu-check lint format sanitize clean

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Asked once, and only by the targets that need to know. SYSTEM=1 or SYSTEM=0 decides instead.
SYSTEM ?= $(eval SYSTEM := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null || echo 0))$(SYSTEM)
PY      = $(if $(filter 1,$(SYSTEM)),$(PYTHON),$(VENV)/bin/python)
BUILT   = $(if $(filter 1,$(SYSTEM)),build/.inplace,$(VENV)/.built)
# Tests run on all cores where pytest-xdist is there.
PYTEST  = $(PY) -m pytest $(shell $(PY) -c "import xdist" 2>/dev/null && echo '-n auto')

NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

help: ## this list
	@echo "make TARGET, one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $$(BUILT) ## set up, build, and say what runs where
	$(PY) -m fusedtricks

demo: $$(BUILT) ## train on handwritten digits with torch's parts and with ours: the same curves, the time of each step
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PY) examples/digits.py $(ARGS)

test: $$(BUILT) ## every check that needs no GPU, and those on the GPU where there is one
	$(PYTEST) tests $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(wildcard tests/test_parity.py tests/test_philox.py tests/test_triton_*.py) $(ARGS)

bench: $$(BUILT) ## throughput here; OPS="layer_norm rms_norm" chooses, ARGS="--quick --json F --plot F" passes on
	$(PY) -m bench $(OPS) $(ARGS)

gpu-check: ## all GPU checks, no network; GPU_CHECK="parity bench:layer_norm" chooses, GPU_CHECK_OUT is the folder
	$(PYTHON) bench/gpu_check.py

lint: $(VENV)/.lint ## ruff and clang-format, checking only
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint ## ruff and clang-format, rewriting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

sanitize: $$(BUILT) ## CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on the parity cases
	tests/sanitize.sh $(PY) $(ARGS)

clean: ## remove what was built and written; .venv stays
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.built
	rm -f fusedtricks/*.so fusedtricks/triton_kernels
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('fusedtricks needs Python 3.10 or later; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: requirements/dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -r requirements/dev.txt
	@touch $@

$(VENV)/.lint: requirements/lint.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -r requirements/lint.txt
	@touch $@

$(VENV)/.built: $(VENV)/.dev $(NATIVE)
	$(VENV)/bin/python -m pip install --no-build-isolation --no-deps -v -e .
	@touch $@

# In place, so that the interpreter's own packages stay as they are; `demo` names the place. For the GPUs that are here,
# as gpu-check builds, unless TORCH_CUDA_ARCH_LIST says which.
build/.inplace: $(NATIVE)
	@mkdir -p build
	ln -sfn ../triton_kernels fusedtricks/triton_kernels
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$$($(PYTHON) -c 'from bench.gpu_check import archs; print(archs())')}" \
	  $(PYTHON) setup.py build_ext --inplace
	@touch $@
