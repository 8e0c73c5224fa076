# Two commands do all set-up on a fresh machine with Python 3.11 to 3.13: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes with one thread each: more threads would only fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-base test-timm test-newest newer check docs links bench app build clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## the main job on the bundled model, into demo/
	rm -rf demo
	$(BIN)/vitxr demo --output demo

test: $(VENV)/.installed test-base test-timm  ## every test; a test that would be skipped fails
	PATH="$$PATH:/sbin" sh scripts/chromium.sh
	VITXR_NO_SKIP=1 $(PYTEST) tests

# What a user installs: the wheel, built from the sdist, where neither torch nor panel is.
test-base: build
	test -e $(VENV)-base/bin/python || $(PYTHON) -m venv $(VENV)-base
	$(VENV)-base/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pytest dist/*.whl
	$(VENV)-base/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	cd tests && $(abspath $(VENV))-base/bin/pytest -p no:cacheprovider --rootdir=base --confcutdir=base -c ../pyproject.toml base

# Beside the others, not among them: timm needs torchvision, and where that is built for another
# torch than the one that is installed, transformers cannot be imported either.
$(VENV)-timm/.installed: $(VENV)/.installed
	rm -rf $(VENV)-timm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)-timm timm==1.0.31 torchvision==0.28.0
	touch $@

test-timm: $(VENV)-timm/.installed  ## models of timm
	PYTHONPATH=$(VENV)-timm OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider --confcutdir=tests/timm tests/timm

# The store's tests need no torch, and zarr's newest needs a newer Python than ours supports at least.
NEWER ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) $(shell command -v python3.13 || command -v python3.12))

newer:
	@echo $(NEWER)

test-newest:  ## the store's tests with the newest zarr, xarray, dask; NEWER=python3.13
	@test -n "$(NEWER)" || { echo "Python 3.12 or newer was not found: make test-newest NEWER=..."; exit 1; }
	$(NEWER) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[s3]' pytest hypothesis
	$(VENV)-newest/bin/python -c "import zarr, sys; print('zarr', zarr.__version__, 'Python', sys.version.split()[0])"
	$(VENV)-newest/bin/python -m pytest -p no:cacheprovider tests/test_store.py tests/test_shards.py tests/test_verify.py
	$(VENV)-newest/bin/python -m pytest -p no:cacheprovider --confcutdir=tests/base tests/base

check: $(VENV)/.installed $(VENV)-timm/.installed  ## lint, format, types, links, doctests; warnings are errors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/vocabulary.py --check
	$(BIN)/python scripts/rooms.py --check
	OMP_NUM_THREADS=1 $(BIN)/python scripts/families.py --check --timm $(VENV)-timm
	$(BIN)/python scripts/check_links.py README.md CONTRIBUTING.md docs
	$(PYTEST) --doctest-modules vitxr

docs: $(VENV)/.installed  ## the site, into docs/_build/html; every code cell is executed
	$(BIN)/python scripts/vocabulary.py
	$(BIN)/python scripts/rooms.py
	$(BIN)/python scripts/check_links.py README.md CONTRIBUTING.md docs
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_docs.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -j 2 -b html docs docs/_build/html

links: $(VENV)/.installed  ## links of the site to other sites; needs a network
	$(BIN)/python -m sphinx -q -D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer -b linkcheck docs docs/_build/links

bench: $(VENV)/.installed  ## speed, as ratios measured side by side
	$(BIN)/python benchmarks/main_job.py
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/ncp.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/app.py

app: $(VENV)/.installed  ## look at the demo's report
	test -e demo/report.html || $(MAKE) demo
	$(BIN)/python -m webbrowser -t "file://$(CURDIR)/demo/report.html"

build: $(VENV)/.installed  ## wheel and sdist, their contents checked
	rm -rf dist build
	$(BIN)/python -m build >/dev/null
	$(BIN)/python scripts/check_dist.py

clean:
	rm -rf $(VENV) $(VENV)-base $(VENV)-timm $(VENV)-newest demo docs/_build docs/generated build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
