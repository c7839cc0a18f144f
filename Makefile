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
BUILD_NEEDS := 'pip>=22.2' 'scikit-build-core>=0.10,<2' 'nanobind>=2.4,<4' 'numpy>=2.0,<3' \
	$(if $(shell command -v cmake),,'cmake>=3.18') $(if $(shell command -v ninja),,ninja)
DEPENDENCIES := $(BIN)/python tests/packaging/dependencies.py
OWN_TARGET := models or web or clusters or devices
TESTS := $(CACHED) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
FAST_TESTS := $(TESTS) -m "not (long or slow or $(OWN_TARGET))"

.PHONY: help demo test test-long check test-all test-models web test-web test-clusters test-devices test-versions lint format stubs site bench sanitize guard check-platforms sbom clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

demo: $(VENV)/installed  ## the whole workflow on real speech, in under a minute
	$(BIN)/cellstack demo

test: $(VENV)/tested  ## the tests, without those of a second or more
	$(FAST_TESTS)

check: $(VENV)/checked  ## those of them that a change affects; the first run records it, and takes longer than make test
	$(FAST_TESTS) --testmon --testmon-forceselect

test-long: $(VENV)/tested  ## the tests of a second or more, without the slow ones
	$(TESTS) -m "long and not (slow or $(OWN_TARGET))"

test-all: $(VENV)/tested  ## all tests, except those that download or have their own target
	$(CACHED) $(BIN)/python -m pytest -m "not ($(OWN_TARGET))"

test-models: $(VENV)/tested  ## published models, downloaded, compared with their own runtimes
	$(CACHED) $(BIN)/python -m pytest -m models -s

web:  ## the npm package for browsers and Node, in web/dist; needs Emscripten
	emcmake cmake -S . -B build/web -DCMAKE_BUILD_TYPE=Release
	cmake --build build/web
	$(PYTHON) web/build.py build/web/cellstack.wasm

test-web: $(VENV)/tested web  ## the tests of the npm package, which also need Node and Chromium
	$(CACHED) CI=true $(BIN)/python -m pytest -m web tests/web

test-clusters:  ## scoring and training on Ray, Dask and Spark; needs Java 17, and installs into .venv-clusters
	$(PYTHON) -m venv .venv-clusters
	.venv-clusters/bin/pip install -q -e '.[clusters]'
	$(CACHED) .venv-clusters/bin/python -m pytest -m clusters tests/scale

test-devices: $(VENV)/tested  ## the C code on emulated Cortex-M processors; needs arm-none-eabi-gcc and QEMU
	$(CACHED) CI=true $(BIN)/python -m pytest -m devices tests/devices -s

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

stubs: $(VENV)/tested  ## write what follows from declarations: stubs, the table of options, the kernel's and JavaScript's tables
	$(BIN)/python tests/architecture/stubs.py
	$(BIN)/python web/write_kinds.py
	$(BIN)/python kernel/declared.py

site: $(VENV)/installed  ## the documentation as a site, in build/site: warnings and files of other hosts are errors
	$(DEPENDENCIES) docs
	rm -rf docs/reference/generated  # it may have names that are gone
	$(BIN)/sphinx-build -W --keep-going -E -b html -j auto -d build/site-cache docs build/site
	! grep -rlE '<(script|img|iframe|link rel="stylesheet")[^>]*(src|href)="https?:' build/site --include='*.html'

bench: $(VENV)/tested  ## all benchmarks: cellstack and the libraries it is compared with
	$(DEPENDENCIES) bench
	for name in inference training accelerated text step scaling family slstm mlstm tirex pool trace monitor; do $(UNTUNED) $(BIN)/python benchmarks/$$name.py || exit 1; done

sanitize:  ## the kernel's tests under ASan and UBSan, then under TSan
	PYTHON=$(PYTHON) tests/sanitize.sh address,undefined libasan.so
	PYTHON=$(PYTHON) tests/sanitize.sh thread libtsan.so

guard: $(VENV)/tested  ## the compiler's memory; instructions that processors lack; counts of instructions (valgrind), which RECORD=1 records
	$(BIN)/python tests/guard/compiler.py
	$(BIN)/python tests/guard/foreign.py
	$(BIN)/python tests/guard/instructions.py $(if $(RECORD),--record)

check-platforms: $(VENV)/ready  ## run the kernel on other systems, for which Zig compiles it, and on emulated processors
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
	rm -rf $(VENV) .venv-sanitize-* .venv-clusters .venv-versions build .pytest_cache .ruff_cache .hypothesis .testmondata* cellstack-demo \
		docs/reference/generated
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready:
	@command -v $(PYTHON) >/dev/null || { echo "make: expected $(PYTHON): on Debian or Ubuntu, apt-get install python3" >&2; exit 1; }
	@$(PYTHON) tests/packaging/system.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(BUILD_NEEDS) || { echo "make: pip failed: without a network, it needs an index in its configuration" >&2; exit 1; }
	touch $@

# The dependencies are downloaded and installed while the kernel compiles; make fails if either does.
$(VENV)/installed: $(VENV)/ready $(SOURCES)
	@echo "installing PyTorch, and compiling the kernel: one or two minutes"
	$(DEPENDENCIES) torch & \
	$(BIN)/pip install -q --no-deps --no-build-isolation --check-build-dependencies -e .; kernel=$$?; \
	wait $$! && exit $$kernel
	touch $@

$(VENV)/tested: pyproject.toml | $(VENV)/installed
	@echo "installing what the tests need: one or two minutes"
	$(DEPENDENCIES) test lint
	touch $@

# pytest-testmon records which tests execute which Python function. It doesn't see the kernel, whose tests run here.
$(VENV)/checked: $(VENV)/installed | $(VENV)/tested
	$(BIN)/pip install -q 'pytest-testmon>=2.2'
	@if [ -e .testmondata ]; then $(FAST_TESTS) tests/kernel; \
	else echo "make check: the first run takes longer than make test: all tests run, and what they execute is recorded"; fi
	touch $@
