# Every target creates the virtual environment .venv and installs what it needs. PYTHON=… selects another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A BLAS that uses another processor's routines would slow down the libraries that benchmarks compare with.
UNTUNED := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE
# Tests start many processes. Without bytecode files, each of these would compile the package again.
CACHED := env -u PYTHONDONTWRITEBYTECODE
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernel/*)
# The build requirements of pyproject.toml. Builds use them from .venv: pip's isolated environment has a new path each
# time, which would compile everything again.
BUILD_NEEDS := 'scikit-build-core>=0.10,<2' 'nanobind>=2.4,<4' 'numpy>=2.0,<3' \
	$(if $(shell command -v cmake),,'cmake>=3.18') $(if $(shell command -v ninja),,ninja)
INSTALL := $(BIN)/pip install -q --no-build-isolation --check-build-dependencies -e

.PHONY: help demo test test-all test-models web test-web test-clusters test-devices test-versions lint format stubs site bench sanitize guard check-platforms sbom clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

demo: $(VENV)/installed  ## the whole workflow on real speech, in under a minute
	$(BIN)/cellstack demo

test: $(VENV)/tested  ## the tests, without the slow ones
	$(CACHED) $(BIN)/python -m pytest -m "not slow and not models and not web and not clusters and not devices" -n auto --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/tested  ## all tests, except those that download or have their own target
	$(CACHED) $(BIN)/python -m pytest -m "not models and not web and not clusters and not devices"

test-models: $(VENV)/tested  ## published models, downloaded, compared with their own runtimes
	$(CACHED) $(BIN)/python -m pytest -m models -s

web:  ## the npm package for browsers and Node, in web/dist; needs Emscripten
	emcmake cmake -S . -B build/web -DCMAKE_BUILD_TYPE=Release
	cmake --build build/web
	$(PYTHON) web/build.py build/web/cellstack.wasm

test-web: $(VENV)/tested web  ## the tests of the npm package, which also need Node and Chromium
	$(CACHED) $(BIN)/python -m pytest -m web tests/web

test-clusters:  ## scoring and training on Ray, Dask and Spark; needs Java 17, and installs into .venv-clusters
	$(PYTHON) -m venv .venv-clusters
	.venv-clusters/bin/pip install -q -e '.[clusters]'
	$(CACHED) .venv-clusters/bin/python -m pytest -m clusters tests/scale

test-devices: $(VENV)/tested  ## the C code on emulated Cortex-M processors; needs arm-none-eabi-gcc and QEMU
	$(CACHED) $(BIN)/python -m pytest -m devices tests/devices -s

test-versions:  ## tests with other versions of Python, torch and the other libraries; VERSIONS=newest, or other names
	$(PYTHON) -m venv .venv-versions/uv
	.venv-versions/uv/bin/pip install -q uv
	$(CACHED) .venv-versions/uv/bin/python tests/versions.py $(VERSIONS)

lint: $(VENV)/tested  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror kernel/*.h kernel/*.cpp tests/guard/*.cpp
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/tested  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i kernel/*.h kernel/*.cpp tests/guard/*.cpp

stubs: $(VENV)/tested  ## write the stubs of the layers' and cells' constructors, and the kinds of cell for JavaScript
	$(BIN)/python tests/architecture/stubs.py
	$(BIN)/python web/kinds.py

site: $(VENV)/tested  ## the documentation as a site, in build/site: warnings and files of other hosts are errors
	$(INSTALL) '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -E -b html -j auto -d build/site-cache docs build/site
	! grep -rlE '<(script|img|iframe|link rel="stylesheet")[^>]*(src|href)="https?:' build/site --include='*.html'

bench: $(VENV)/tested  ## all benchmarks: cellstack and the libraries it is compared with
	$(INSTALL) '.[bench]'
	for name in inference training accelerated text step scaling family slstm mlstm tirex pool trace monitor; do $(UNTUNED) $(BIN)/python benchmarks/$$name.py || exit 1; done

sanitize:  ## the kernel's tests under ASan and UBSan, then under TSan
	PYTHON=$(PYTHON) tests/sanitize.sh address,undefined libasan.so
	PYTHON=$(PYTHON) tests/sanitize.sh thread libtsan.so

guard: $(VENV)/ready  ## the compiler's memory, and the kernel's instructions (valgrind); RECORD=1 records their counts
	$(BIN)/python tests/guard/compiler.py
	$(BIN)/python tests/guard/instructions.py $(if $(RECORD),--record)

check-platforms: $(VENV)/ready  ## compile the kernel for other systems with Zig, and run it where possible
	$(BIN)/pip install -q 'ziglang>=0.14'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/packaging/platforms.py

sbom:  ## build/cellstack.cdx.json: what the package needs and contains (CycloneDX)
	$(PYTHON) -m venv --clear build/sbom
	build/sbom/bin/pip install -q -C cmake.define.CELLSTACK_SETS=baseline . nanobind
	build/sbom/bin/pip uninstall -q -y pip
	$(PYTHON) -m venv --clear build/cyclonedx
	build/cyclonedx/bin/pip install -q 'cyclonedx-bom>=7,<8'
	build/cyclonedx/bin/cyclonedx-py environment build/sbom --pyproject pyproject.toml --gather-license-texts \
		--output-reproducible --output-file build/cellstack.cdx.json

clean:  ## remove what the targets created
	rm -rf $(VENV) .venv-sanitize-* .venv-clusters .venv-versions build .pytest_cache .ruff_cache .hypothesis cellstack-demo \
		docs/reference/generated
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(BUILD_NEEDS)
	touch $@

$(VENV)/installed: $(VENV)/ready $(SOURCES)
	@echo "installing, and compiling the kernel: about a minute"
	$(INSTALL) '.[torch]'
	touch $@

$(VENV)/tested: $(VENV)/ready $(SOURCES)
	@echo "installing, and compiling the kernel: one or two minutes"
	$(INSTALL) '.[test,lint]'
	touch $@ $(VENV)/installed
