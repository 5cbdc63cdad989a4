# Every target makes what it needs by itself. By hand: Python 3.11 or later with venv, a C++17 compiler, make.
#
#   make demo         photographs through a dynamic network, and digits learnt from scratch (pictures in demo-output/)
#   make test         the test suite                        make test-full   all of it, then under sanitizers
#   make bench        the benchmarks, in five minutes       make bench-full  all of them, for hours; rows are saved
#   make lint         style of Python and C++               make format      put the style right
#   make clean        remove what the targets made
#
# On a machine with a GPU, with PYTHON=<path of a Python that has a CUDA torch> and the libraries built beside the package:
#   make gpu-check    the GPU tests, in ten minutes         make gpu-bench   the GPU benchmarks, resumable, in eight
#   make gpu          some of both, in ten minutes
#
# OMP_NUM_THREADS, PIP_EXTRA_INDEX_URL and the like are taken from the environment as usual.

PYTHON ?= python3
VENV ?= .venv
# where it is now: further down the virtual environment comes first on the path
GPU_PYTHON := $(shell command -v $(PYTHON))
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
GPU_BENCH_ARGS ?=
PYTEST_ARGS ?=

# torch comes first and by its exact version: a plain requirement would let the build pull in another one
TORCH := torch==2.13.0
BUILD_TOOLS := setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2 pybind11==3.1.0 numpy==2.4.6
# Triton runs in its interpreter and compiles for GPUs that are not there
TEST_TOOLS := hypothesis==6.170.15 triton==3.9.0
LINT_TOOLS := ruff==0.17.6 clang-format==23.1.5
# the system's CMake, if there is one that is new enough
CMAKE_TOOL = $(shell cmake --version 2>/dev/null | grep -qE 'version (3\.(2[5-9]|[3-9][0-9])|[4-9])' || echo cmake)

BIN := $(VENV)/bin
# the build looks for cmake and ninja there
export PATH := $(abspath $(BIN)):$(PATH)
CPP := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt csrc/cuda/cuda.cmake $(CPP)

.PHONY: demo test test-full bench bench-full gpu gpu-check gpu-bench lint format clean install

demo: install
	$(BIN)/python -m dcd_kernels demo $(DEMO_ARGS)

test: install
	$(COMPILED) -m "not full" $(PYTEST_ARGS)
	$(INTERPRETED) -m "not full" $(PYTEST_ARGS)

# the Triton kernels on the CPU, in a process of its own: what is interpreted cannot be compiled
COMPILED := $(BIN)/python -m pytest -q --ignore tests/triton_kernels/interpreted
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton_kernels/interpreted

# The other runtimes are for comparison alone: without them the networks' suite says what it cannot measure.
# Installed by name: with the project's extra, pip would build the project again.
BENCH_PACKAGES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")
$(VENV)/.bench: pyproject.toml $(VENV)/.installed
	$(BIN)/python -c '$(BENCH_PACKAGES)' > $@.txt
	$(BIN)/pip install -q -r $@.txt
	touch $@

BENCH := $(BIN)/python -m dcd_kernels bench

# with BENCH_ARGS one suite alone, e.g. BENCH_ARGS="networks --networks resnet18"
bench: $(VENV)/.bench
	$(if $(BENCH_ARGS),$(BENCH) $(BENCH_ARGS),\
	$(BENCH) pointwise --quick && $(BENCH) accelerated --quick && $(BENCH) networks --quick)

bench-full: $(VENV)/.bench
	@status=0; \
	for suite in "pointwise --brief" "pointwise --brief --isa avx2 --task forward" \
		"pointwise --brief --dtype bfloat16 --task forward" "accelerated --networks all" \
		"networks" "networks --threads 2 --task inference --batch 8"; do \
		$(BENCH) $$suite --save || status=$$?; \
	done; \
	$(BIN)/python -m benchmarks.readme; \
	exit $$status

# The user's own Python, not the virtual environment's: that one has torch for the CPU. Nothing is installed.
gpu-check:
	$(GPU_PYTHON) tests/gpu/run.py $(GPU_CHECK_ARGS)

gpu-bench:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_BENCH_ARGS)

gpu:
	@status=0; \
	$(GPU_PYTHON) tests/gpu/run.py --minutes 3.5 $(GPU_CHECK_ARGS) || status=$$?; \
	[ $$status -ne 2 ] || exit 2; \
	$(GPU_PYTHON) -m benchmarks.gpu --minutes 4 $(GPU_BENCH_ARGS) || status=$$?; \
	exit $$status

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: Makefile | $(BIN)/python
	$(BIN)/pip install -q $(LINT_TOOLS)
	touch $@

$(VENV)/.tools: Makefile | $(BIN)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q $(BUILD_TOOLS) $(TEST_TOOLS) $(CMAKE_TOOL)
	touch $@

# An editable install: Python files are read from here, so only a changed build input makes this run again
$(VENV)/.installed: $(VENV)/.tools $(BUILD_INPUTS)
	$(BIN)/pip install -q --no-build-isolation -e ".[demo,test]"
	@$(BIN)/python -m dcd_kernels info | grep -E '^(built|left out|kernels):'
	touch $@

# Both sanitizers in one build of its own; torch is not built with them, so their runtime has to be loaded first.
# Leaks are not looked for: Python and torch keep what they allocate until the process ends.
SANITIZED := build-sanitize/lib
SANITIZED_TESTS := tests/test_core.py tests/test_functional.py tests/test_grad.py tests/test_moments.py tests/test_property.py \
	$(wildcard tests/test_ops_*.py) $(addprefix tests/inference/test_,ops_network.py network_graphs.py network_winograd.py network_blocks.py)
SANITIZER_RUNTIME := $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)
SANITIZED_RUN = LD_PRELOAD=$(SANITIZER_RUNTIME) PYTHONPATH=$(SANITIZED) UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1

$(SANITIZED)/.built: $(VENV)/.installed $(wildcard dcd_kernels/*.py dcd_kernels/*/*.py)
	DCD_CMAKE_ARGS="-DDCD_SANITIZE=address,undefined" $(BIN)/python setup.py -q build \
		--build-base build-sanitize --build-lib $(SANITIZED)
	touch $@

test-full: install $(SANITIZED)/.built
	@$(SANITIZED_RUN) $(BIN)/python -P -c "from dcd_kernels import _core; assert _core.build_info()['sanitizers'], _core"
	@status=0; \
	$(COMPILED) $(PYTEST_ARGS) || status=$$?; \
	$(INTERPRETED) $(PYTEST_ARGS) || status=$$?; \
	$(SANITIZED_RUN) $(BIN)/pytest -q $(PYTEST_ARGS) -k "not compile" $(SANITIZED_TESTS) || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build build-sanitize dist *.egg-info demo-output dcd_kernels/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
