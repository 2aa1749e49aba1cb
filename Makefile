# Needs Python 3.10 or newer and make. Everything goes into $(VENV); nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
# A file of versions for pip to keep to, such as constraints.txt; empty: the newest that fit.
CONSTRAINTS ?=
# Worker processes of the tests, more than the cores of a small machine: tests also wait. Each computes in one thread.
JOBS ?= 3

BIN := $(VENV)/bin
# Installs again only if the dependencies have changed or the checkout has moved.
STAMP := $(VENV)/installed-$(shell (pwd; cat pyproject.toml $(CONSTRAINTS)) | cksum | cut -d' ' -f1)

.PHONY: demo test check pages docs install clean

demo: install  ## distil, score, export and use a student of bundled images; a few minutes
	@$(BIN)/python examples/demo.py

test: install  ## every test, and the ten slowest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10

check: install  ## style, types, layers, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

pages: install  ## write the generated pages
	$(BIN)/python docs/generate.py

docs: install  ## build the site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(STAMP)

$(STAMP):
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	rm -f $(VENV)/installed-*
	touch $@

clean:  ## remove the environment; runs/ stays
	rm -rf $(VENV)
