# Everything a newcomer needs; each target does its own set-up. PYTHON=<interpreter> uses an environment of yours instead of .venv.
PYTHON ?= .venv/bin/python

.PHONY: develop
develop: export NORMEXT_BUILD_DIR = build/develop
develop: export NORMEXT_CUDA = 0
develop: export NORMEXT_EMULATOR ?= 1
develop: export NORMEXT_CMAKE_ARGS += -DNORMEXT_TESTS=$(NORMEXT_EMULATOR)
develop:  ## CPU-only, incremental build into normext/, importable from anywhere
	@mkdir -p build
	flock build/develop.lock $(PYTHON) setup.py --quiet build_ext --inplace
	@cd / && $(PYTHON) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('normext') is None)" \
	  || echo "$(CURDIR)" > "$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/normext_develop.pth"
