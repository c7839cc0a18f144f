# Every target makes the virtual environment .venv and installs what it needs. PYTHON=… picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A BLAS that is told to take another processor's routines would make the peers look slow.
UNTUNED := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE
# Tests start many processes: where no bytecode may be kept, each of these compiles the package anew.
CACHED := env -u PYTHONDONTWRITEBYTECODE
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernel/*)

.PHONY: help demo test test-all test-models lint format bench sanitize guard clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/installed  ## the whole story on real speech, in under a minute
	$(BIN)/cellstack demo

test: $(VENV)/tested  ## the tests, without the slow ones
	$(CACHED) $(BIN)/python -m pytest -m "not slow and not models" -n auto --dist loadfile

test-all: $(VENV)/tested  ## all tests, but for those that download
	$(CACHED) $(BIN)/python -m pytest -m "not models"

test-models: $(VENV)/tested  ## published models, downloaded, beside their own runtimes
	$(CACHED) $(BIN)/python -m pytest -m models -s

lint: $(VENV)/tested  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror kernel/*.h kernel/*.cpp tests/guard/*.cpp
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/tested  ## rewrite the sources in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i kernel/*.h kernel/*.cpp tests/guard/*.cpp

bench: $(VENV)/tested  ## cellstack beside its peers, in one run
	$(BIN)/pip install -q -e '.[bench]'
	for name in inference training accelerate text step scaling family pool trace monitor; do $(UNTUNED) $(BIN)/python benchmarks/$$name.py || exit 1; done

sanitize:  ## the kernel's tests under ASan and UBSan, then under TSan
	PYTHON=$(PYTHON) tests/sanitize.sh address,undefined libasan.so
	PYTHON=$(PYTHON) tests/sanitize.sh thread libtsan.so

guard:  ## the kernel's instructions, counted, beside recorded counts (valgrind); RECORD=1 records them
	$(PYTHON) tests/guard/instructions.py $(if $(RECORD),--record)

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-sanitize-* build .pytest_cache .ruff_cache .hypothesis cellstack-demo
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing, and compiling the kernel: this takes some minutes"
	$(BIN)/pip install -q -e '.[torch]'
	touch $@

$(VENV)/tested: $(VENV)/bin/python $(SOURCES)
	@echo "installing, and compiling the kernel: this takes some minutes"
	$(BIN)/pip install -q -e '.[test,lint]'
	touch $@ $(VENV)/installed
