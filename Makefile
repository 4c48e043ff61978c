# `make demo` and `make test` set up everything they need, in virtual environments inside this folder.
PYTHON ?= python3
SGLANG ?= 0.5.17

TEST_ENV := .venv-test-$(SGLANG)
NATIVE := $(wildcard csrc/*.?pp csrc/*/*.?pp csrc/*/*.cu csrc/*/*.cuh)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(NATIVE)
BIN := $(TEST_ENV)/bin

DEMO_ENV := .venv

# pip takes twice as long if it compiles all of SGLang's packages; Python compiles what it imports, and is to keep it.
INSTALL := pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: unit help demo dist docs test test-gpu test-integration test-verl test-wheel lint format tidy sanitize sanitize-gpu clean

help:
	@echo "make demo              train a small model by RL on two ranks, with rollouts from SpmdEngine"
	@echo "make unit              unit and native tests, without SGLang, in a minute"
	@echo "make test              everything that needs no GPU (SGLANG=$(SGLANG))"
	@echo "make test-integration  only the tests with real SGLang, e.g. SGLANG=0.5.23"
	@echo "make test-gpu          everything that needs GPUs; ENV=none: with PYTHON as it is, without a network"
	@echo "make test-verl         with verl and Ray, on the CPU, e.g. VERL=0.5.0 (default $(VERL))"
	@echo "make dist              an sdist and a wheel, in dist"
	@echo "make test-wheel        one integration test from the wheel, in a fresh environment"
	@echo "make docs              the documentation, in out/site; a broken link is an error"
	@echo "make lint | format     ruff, mypy, clang-format"
	@echo "make tidy              clang-tidy over csrc; warnings are errors"
	@echo "make sanitize          tests/native under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make sanitize-gpu      the native tests of tests/gpu under compute-sanitizer's memcheck; needs a GPU"
	@echo "make clean             remove environments and build products"

$(TEST_ENV)/.ready: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(TEST_ENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/$(INSTALL) "sglang==$(SGLANG)" -e ".[test,demo,docs]"
	touch $@

$(DEMO_ENV)/.ready: $(SOURCES) $(wildcard spmd_engine/*.py spmd_engine/*/*.py)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(DEMO_ENV)/bin/python || $(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/pip install --quiet --upgrade pip
	$(DEMO_ENV)/bin/$(INSTALL) "sglang==$(SGLANG)" ".[demo]"
	touch $@

# ARGS: e.g. "--seed 1 --steps 120".
demo: $(DEMO_ENV)/.ready
	OMP_NUM_THREADS=1 $(DEMO_ENV)/bin/torchrun --standalone --nproc_per_node 2 examples/grpo.py --out out $(ARGS)

test: $(TEST_ENV)/.ready
	$(BIN)/python -m pytest -m "not gpu and not multigpu" --ignore tests/frameworks --skips test tests $(ARGS)

# Unit and native tests need torch, but not SGLang's 9 GB. TORCH: what pip installs as torch, with its options.
UNIT_ENV := .venv-unit
TORCH ?= torch==2.13.0

$(UNIT_ENV)/.ready: $(SOURCES) tests/requirements-unit.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(UNIT_ENV)/bin/python || $(PYTHON) -m venv $(UNIT_ENV)
	$(UNIT_ENV)/bin/pip install --quiet --upgrade pip
	$(UNIT_ENV)/bin/$(INSTALL) $(TORCH)
	$(UNIT_ENV)/bin/$(INSTALL) -r tests/requirements-unit.txt
	$(UNIT_ENV)/bin/$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

unit: $(UNIT_ENV)/.ready
	OMP_NUM_THREADS=1 $(UNIT_ENV)/bin/python -m pytest -n 2 --dist worksteal -m "not gpu and not multigpu and not needs_sglang" \
		--skips unit tests/unit tests/native $(ARGS)

# ENV=none: PYTHON itself has SGLang, pytest and what a build needs. The module is built in place.
ifeq ($(ENV),none)
ACCEPTANCE_PYTHON := $(PYTHON)
GPU_READY := gpu-module
else
ACCEPTANCE_PYTHON := $(BIN)/python
GPU_READY := $(TEST_ENV)/.ready
endif

.PHONY: gpu-module
gpu-module:
	$(PYTHON) setup.py --quiet build_ext --inplace

# ARGS: e.g. "-k moe" or "-x". On two H100 or H200 with compiled kernels in less than 8 minutes.
test-gpu: $(GPU_READY)
	$(ACCEPTANCE_PYTHON) -m pytest --acceptance -m "gpu or multigpu" tests/gpu $(ARGS)

VERL ?= 0.9.1
VERL_ENV := .venv-verl-$(VERL)

$(VERL_ENV)/.ready: $(TEST_ENV)/.ready tests/frameworks/make_env.sh
	tests/frameworks/make_env.sh $(TEST_ENV) $(VERL_ENV) $(VERL)
	touch $@

test-verl: $(VERL_ENV)/.ready
	$(VERL_ENV)/bin/python -m pytest tests/frameworks $(ARGS)

test-integration: $(TEST_ENV)/.ready
	$(BIN)/python -m pytest tests/integration $(ARGS)

# The wheel is built from the sdist, so a file that the sdist lacks fails the build.
dist:
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet "build>=1.2"
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist .

test-wheel: dist $(TEST_ENV)/.ready
	tests/packaging/install_wheel.sh dist/*.whl $(TEST_ENV)

docs: $(TEST_ENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(TEST_ENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(TEST_ENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Tools that build and check csrc by themselves. The module that they build is for the Python of the test environment.
NATIVE_ENV := .venv-native
CMAKE := $(NATIVE_ENV)/bin/cmake

$(NATIVE_ENV)/.ready: Makefile
	$(PYTHON) -m venv $(NATIVE_ENV)
	$(NATIVE_ENV)/bin/$(INSTALL) "pybind11>=2.13" "cmake>=3.26" ninja clang-tidy==23.1.4
	touch $@

# $(call configure,folder,options)
configure = $(CMAKE) -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(NATIVE_ENV)/bin/ninja \
	-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	-Dpybind11_DIR=$$($(NATIVE_ENV)/bin/python -m pybind11 --cmakedir) -DSPMD_ENGINE_WERROR=ON $(2)

tidy: $(TEST_ENV)/.ready $(NATIVE_ENV)/.ready
	$(call configure,build/tidy,-DCMAKE_EXPORT_COMPILE_COMMANDS=ON)
	$(NATIVE_ENV)/bin/clang-tidy --quiet -p build/tidy --extra-arg=-Wno-unknown-warning-option \
		$$(sed -n 's/^ *"file": "\(.*\.cpp\)".*/\1/p' build/tidy/compile_commands.json)

# A package beside the one in the tree, of the same Python files and a watched module. ASan must be the first library of
# the process; Python itself frees little at its end, so leaks are not looked for.
sanitize: $(TEST_ENV)/.ready $(NATIVE_ENV)/.ready
	$(call configure,build/sanitize,-DSPMD_ENGINE_SANITIZE=ON -DSPMD_ENGINE_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo)
	$(CMAKE) --build build/sanitize
	rm -rf build/sanitize/site && mkdir -p build/sanitize/site/spmd_engine
	ln -s $(filter-out %.so,$(abspath $(wildcard spmd_engine/*))) build/sanitize/site/spmd_engine/
	cp build/sanitize/_C*.so build/sanitize/site/spmd_engine/
	SPMD_ENGINE_CUDA=OFF PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/sanitize/site PYTHONMALLOC=malloc \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -p no:cacheprovider tests/native $(ARGS)

# Without torch's own caching every tensor is an allocation, whose ends memcheck knows. Chunks of expandable segments are
# torch's caching; the test that measures time fails under memcheck. Some tests make CUDA calls fail on purpose.
MEMCHECK := compute-sanitizer --tool memcheck --target-processes all --report-api-errors no --error-exitcode 9
GPU_PYTHON ?= $(PYTHON)

sanitize-gpu:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(MEMCHECK) $(GPU_PYTHON) -m pytest tests/gpu/test_native_cuda.py $(ARGS)
	$(MEMCHECK) $(GPU_PYTHON) -m pytest tests/gpu/test_native_vmm.py -k "not takes_little_time" $(ARGS)

clean:
	rm -rf .venv .venv-dist .venv-native .venv-unit .venv-test-* .venv-verl-* build dist out spmd_engine/_C*.so *.egg-info
