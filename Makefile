# make erase      erase "star" from the embedded model on this machine, with pictures and a table
# make test       the default test suite;  make test-slow  the long ones
#
# Both create .venv when it is missing and then install only when requirements.lock or setup.py changed.
# Variables: PYTHON (the interpreter that makes .venv), MODEL, CONCEPT, OUT, ARGS (more `aegis erase` options).

PYTHON ?= python3
MODEL ?= world
CONCEPT ?= star
OUT ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Editable without build isolation: the pinned setuptools builds it, nothing unpinned is fetched.
INSTALL := $(PIP) install -c requirements.lock --no-build-isolation
PINS := requirements.lock setup.py pyproject.toml

.DELETE_ON_ERROR:
.PHONY: erase test test-slow lint clean

erase: .venv/core.stamp
	@$(BIN)/aegis erase --model "$(MODEL)" --concept "$(CONCEPT)" $(if $(OUT),--out "$(OUT)") $(ARGS)

test: .venv/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/test.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/test.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# A stamp of its own, because a venv that was interrupted half-way has a python but no pip.
.venv/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "aegis: error: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "aegis: error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/core.stamp: .venv/venv.stamp $(PINS)
	@echo "Installing the pinned packages into .venv (once, one to three minutes) ..."
	@$(PIP) install -c requirements.lock setuptools
	@$(INSTALL) -e .
	@touch $@

.venv/test.stamp: .venv/core.stamp
	@echo "Installing the test packages, PyTorch among them (once) ..."
	@$(INSTALL) -e '.[torch,report,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
