# `make demo` and `make test` each work from nothing: they make a virtual environment in .venv and install into it first.
# They need Python 3.11 or newer, for constraints.txt pins versions that do; choose one with `make demo PYTHON=python3.12`.
# (The package itself runs on Python 3.10 as well: `pip install .`)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A process per core, for each test runs on one thread; more than four spend their time importing torch. A test that
# hangs fails after ten minutes, with the stack that it hangs in.
TOGETHER := --numprocesses auto --maxprocesses 4 --timeout 600
PYTEST := $(BIN)/python -m pytest $(TOGETHER)

.PHONY: help demo test test-long test-engines test-versions test-gpu lint coverage docs dist matrix bench bench-gpu clean

help:
	@echo "make demo      train a network on digits, normally and adversarially, and attack it (under 4 minutes)"
	@echo "make test      lint, types and all tests but the long ones, examples and README included (under 10 minutes);"
	@echo "               at least 95 % of lines and branches run"
	@echo "make test-long the others: benchmarks, several processes, compilers, many attacks (under 8 minutes)"
	@echo "make test-engines  the tests again, with each engine in the place of the eager one"
	@echo "make test-versions  the tests on other versions of PyTorch, each in an environment of its own (gigabytes, long)"
	@echo "make test-gpu  what needs a CUDA device, in the environment that is there (under 3 minutes)"
	@echo "make lint      ruff, mypy and the order of imports alone"
	@echo "make coverage  all tests, the long ones too, with the lines that none of them ran, also in htmlcov/"
	@echo "make docs      these pages as a site in build/site, every link checked (under a minute)"
	@echo "make dist      a wheel and a source distribution in dist/, checked"
	@echo "make matrix    every attack of torchattacks and foolbox on plain and fast models (under 60 minutes, resumable)"
	@echo "make bench     every way to run the same attack, on four networks (under 20 minutes on two cores)"
	@echo "make bench-gpu the same at full sizes on a CUDA device, in the environment that is there (meant to take under 5 minutes)"
	@echo "make clean     remove the environment and everything that was generated"

# What the script has trained is then compared and evaluated by the command.
DIGITS := --data build/demo/digits.safetensors --eps 0.15
demo: $(INSTALLED)
	$(BIN)/python examples/demo.py
	$(BIN)/fastadv compare examples/digits.py:DigitsNet --weights build/demo/adversarial.safetensors $(DIGITS)
	$(BIN)/fastadv evaluate examples/digits.py:DigitsNet --weights build/demo/adversarial.safetensors $(DIGITS) --attacks quick

test: lint
	$(PYTEST) --cov -m "not long"

test-long: $(INSTALLED)
	$(PYTEST) -m long

# Compiled without code generation (every model would take seconds); CUDA graphs by their bookkeeping, without CUDA.
test-engines: $(INSTALLED)
	$(PYTEST) --engine compile
	$(PYTEST) --engine cudagraph

# The oldest version that pyproject.toml allows, and one in between: make test-versions VERSIONS=2.8.0
VERSIONS ?= 2.6.0 2.11.0
test-versions: $(VERSIONS:%=build/versions/%/.installed)
	for version in $(VERSIONS); do \
		build/versions/$$version/bin/python -m pytest $(TOGETHER) || exit 1; \
	done

# What PyTorch itself pins, or what has to fit it, is left to it.
build/versions/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/versions/$*
	{ grep -vE '^(torch|torchvision|sympy|networkx|setuptools)==' constraints.txt; echo 'torch==$*'; } > build/versions/$*/constraints.txt
	build/versions/$*/bin/python -m pip install --constraint build/versions/$*/constraints.txt --editable '.[dev]'
	@touch $@

# In the environment that is there: nothing is installed. Collected are the files that hold such tests, and no others.
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'pytest\.mark\.cuda' tests | sort)
test-gpu:
	$(PYTHON) -m pytest -m cuda $(GPU_TESTS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing --cov-report=html

# Sphinx, in an environment of its own that sees this one: torchattacks pins a `requests` that Sphinx does not take.
DOCS := build/docs-env
docs: $(DOCS)/.installed
	rm -rf build/site
	$(DOCS)/bin/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky --doctree-dir build/doctrees docs build/site
	$(DOCS)/bin/python docs/check_links.py build/site
	@echo "open build/site/index.html"

SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
$(DOCS)/.installed: docs/constraints.txt $(INSTALLED)
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --no-deps --requirement docs/constraints.txt
	$(BIN)/python -c '$(SITE_PACKAGES)' > "$$($(DOCS)/bin/python -c '$(SITE_PACKAGES)')/after.pth"
	@touch $@

# Built and looked at in an environment of its own, with nothing of the package's in it.
DIST := build/dist-env
dist: $(DIST)/.installed
	rm -rf dist
	$(DIST)/bin/python -m build
	$(DIST)/bin/python -m twine check --strict dist/*

$(DIST)/.installed:
	$(PYTHON) -m venv --clear $(DIST)
	$(DIST)/bin/python -m pip install 'build==1.6.1' 'twine==7.0.0'
	@touch $@

# What has been run is kept in build/matrix; docs/compatibility.md is written from what is there.
matrix: $(INSTALLED)
	$(BIN)/python -m benchmarks.matrix

# Options of the command in OPTIONS: make bench OPTIONS="--sweep --networks resnet18"
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.speed $(OPTIONS)

# In the environment that is there: nothing is installed.
bench-gpu:
	$(PYTHON) -m benchmarks.speed --size full --device cuda --rows lean $(OPTIONS)

# Made again when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expected Python 3.11 or newer, got: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	rm -rf *.egg-info  # of an install made by setuptools: from here it would be taken for a second one
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo.png demo.md
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
