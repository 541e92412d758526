# Everything a newcomer needs; each target but gpu-check sets up what it uses. The interpreter is .venv/bin/python, made on first use; with
# PYTHON=<interpreter> it is one of yours, into which nothing but missing build and test tools is installed.
# CUDA is built where there is an nvcc (NORMEXT_CUDA=0 skips it); setup.py lists the other variables.
PYTHON ?= .venv/bin/python
# Installed when the python3 at hand has no torch of its own; the release the suite was last run with.
NORMEXT_TORCH_SPEC ?= torch==2.13.0
OUT ?= out

# For commands that run elsewhere, or look for the tools beside it.
PYTHON_PATH = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
TOOLS = PATH="$(dir $(PYTHON_PATH)):$$PATH"
# A build in a folder of its own, and the suite from there, so that every process that a test starts imports that build.
APART = $(NORMEXT_BUILD_DIR)/python
BUILD_APART = $(PYTHON) setup.py --quiet build --build-lib $(APART)
FROM_APART = cd $(APART) && PYTHONPATH="$$PWD"
SUITE = $(PYTHON_PATH) -m pytest $(CURDIR)/tests
GROUP = $(PYTHON) -m pip install --disable-pip-version-check --quiet --group
FORMATTED = $(shell git ls-files 'csrc/*' 'tests/simt/*' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh|inl)$$')

ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/environment
endif

.PHONY: help environment build develop demo test bench gpu-check mutants sanitize avx512-test kernels kernel-table lint format neon neon-test torch-oldest
help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# A torch that python3 can import is shared with .venv; numpy and the like come along.
.venv/environment: pyproject.toml
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	@if torch=$$(python3 -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null); then \
	  echo "sharing the torch in $$torch"; \
	  echo "$$torch" > "$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/torch_of_python3.pth"; \
	else $(PYTHON) -m pip install --disable-pip-version-check --quiet "$(NORMEXT_TORCH_SPEC)"; fi
	$(GROUP) build
	touch $@

environment: $(ENVIRONMENT)

# One build at a time, whoever asks, and one CMake folder, so that only what changed is compiled. A .pth file makes normext
# importable from outside the source tree, too.
define BUILD
	mkdir -p build
	flock build/lock $(PYTHON) setup.py --quiet build_ext --inplace
	@$(PYTHON) -I -c "import importlib.util as u, pathlib as p, sysconfig as s; u.find_spec('normext') or \
	  p.Path(s.get_paths()['purelib'], 'normext_develop.pth').write_text('$(CURDIR)')"
endef

export NORMEXT_BUILD_DIR ?= build/main

build: environment  ## compile into normext/
	$(BUILD)

develop test mutants: export NORMEXT_EMULATOR ?= 1
develop test mutants: export NORMEXT_CMAKE_ARGS += -DNORMEXT_TESTS=$(NORMEXT_EMULATOR)
develop: export NORMEXT_BUILD_DIR = build/develop
develop: export NORMEXT_CUDA = 0
develop: environment  ## compile without CUDA, with the emulator and the C++ tests
	$(BUILD)

demo: build  ## real models before and after normext.convert: errors, times, a plot
	$(GROUP) demo
	$(PYTHON) benchmarks/demo.py

test: environment  ## the whole suite on every back end this machine has; PYTEST_ARGS="-k ..." selects
	$(BUILD)
	$(GROUP) test
	$(PYTHON) -m pytest tests $(PYTEST_ARGS)

mutants: develop  ## proves that the suite notices bugs: it must fail on each planted one
	$(GROUP) test
	$(PYTHON) tests/mutants.py

sanitize: export NORMEXT_BUILD_DIR = build/sanitize
sanitize: export NORMEXT_CUDA = 0
sanitize: export NORMEXT_EMULATOR = 1
sanitize: export NORMEXT_CMAKE_ARGS += -DNORMEXT_TESTS=ON -DNORMEXT_SANITIZE=address,undefined
sanitize: environment  ## emulated CUDA kernels, CPU kernels and C++ tests under AddressSanitizer and UBSan
	$(BUILD_APART)
	$(TOOLS) ctest --test-dir $(NORMEXT_BUILD_DIR) --output-on-failure
	$(GROUP) test
	$(FROM_APART) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(SUITE) $(PYTEST_ARGS)

avx512-test: export NORMEXT_BUILD_DIR = build/avx512
avx512-test: export NORMEXT_CUDA = 0
avx512-test: export NORMEXT_CPU_ISAS = avx512
avx512-test: export NORMEXT_CMAKE_ARGS += -DNORMEXT_AVX512_ON_AVX2=ON
avx512-test: environment  ## the suite on the AVX-512 kernels where the processor has AVX2 alone, slowly
	$(BUILD_APART)
	$(GROUP) test
	$(FROM_APART) $(SUITE) --backend avx512 $(PYTEST_ARGS)

bench: build  ## every published figure, about 30 minutes on an idle machine
	$(GROUP) bench
	$(PYTHON) benchmarks/run.py

# With the python3 at hand, whose torch sees the GPU, unless PYTHON says otherwise; nothing is installed.
gpu-check:  ## on a GPU machine: suite, graph capture, sanitizers, benchmarks; results in $OUT, GPU_ARGS="--only ..." selects
	$(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),python3) tests/gpu_check.py $(OUT) $(GPU_ARGS)

kernels: export NORMEXT_CUDA = 1
kernels: build  ## spill gate: registers, spills and machine code of every CUDA kernel, without a GPU
	$(PYTHON) tests/check_kernels.py $(NORMEXT_BUILD_DIR)

kernel-table: export NORMEXT_CUDA = 1
kernel-table: export NORMEXT_CUDA_ARCHS ?= 80 86 89 90 100 120
kernel-table: export NORMEXT_BUILD_DIR = build/kernel-table
kernel-table: build
	$(PYTHON) tests/check_kernels.py $(NORMEXT_BUILD_DIR) --update

lint: environment  ## ruff, mypy --strict, clang-format
	$(GROUP) lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run --Werror $(FORMATTED)

format: environment
	$(GROUP) lint
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .
	$(dir $(PYTHON))clang-format -i $(FORMATTED)

# All templates are instantiated; no machine code is made.
neon:  ## the CPU kernels for aarch64, by a cross compiler (Debian and Ubuntu: g++-aarch64-linux-gnu)
	printf '%s\n' isa_neon isa_scalar isa channel_norm | xargs -P "$${MAX_JOBS:-$$(nproc)}" -I SOURCE \
	  aarch64-linux-gnu-g++ -std=c++17 -fsyntax-only -Wall -Wextra -Werror -Icsrc csrc/cpu/SOURCE.cpp

neon-test: environment  ## the C++ tests of the CPU kernels for aarch64 under QEMU (Debian and Ubuntu: qemu-user as well)
	$(TOOLS) cmake -G Ninja -B build/neon -DNORMEXT_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(TOOLS) cmake --build build/neon --target test_cpu_kernels
	$(TOOLS) ctest --test-dir build/neon --output-on-failure -R test_cpu_kernels

# What compiles against this torch's headers may not against those of torch 2.10, the oldest supported. Its aarch64 wheel is a
# small CPU build, and headers are all that is needed.
torch-oldest: environment  ## csrc/ops against the headers of torch 2.10
	mkdir -p build/torch-2.10
	test -d build/torch-2.10/torch || ($(PYTHON) -m pip download --quiet --no-deps --platform manylinux_2_28_aarch64 --python-version 3.11 \
	  --only-binary=:all: --dest build/torch-2.10 torch==2.10.0 && cd build/torch-2.10 && unzip -q torch-*.whl 'torch/include/*' 'torch/version.py' \
	  && rm torch-*.whl)
	ls csrc/ops/*.cpp | grep -v module.cpp | xargs -P "$${MAX_JOBS:-$$(nproc)}" -I SOURCE sh -c 'for cuda in 0 1; do \
	  c++ -std=c++17 -fsyntax-only -Wall -Wextra -DTORCH_TARGET_VERSION=0x020a000000000000 -DNORMEXT_WITH_CUDA=$$cuda -DNORMEXT_EMULATED=0 \
	    -Icsrc -isystem build/torch-2.10/torch/include -isystem build/torch-2.10/torch/include/torch/csrc/api/include SOURCE || exit 1; \
	done'
