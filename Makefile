# What a person types. Everything runs in .venv, which is made on first use: `make test` and `make demo` need only
# Linux x86-64, Python and make.
#
#   PYTHON=python3.12    another Python to make .venv with (3.10 or later)
#   TORCH_INDEX=URL      where torch comes from, e.g. https://download.pytorch.org/whl/cpu for the smaller CPU-only build

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test hosts gpu reviewed compile-all lint start-cost clean

help:
	@echo "make demo         fetch SGLang 0.5.11, patch it, run its kernel and ours side by side"
	@echo "make test         lint, types, and every test that needs no GPU"
	@echo "make hosts        every reviewed SGLang release (downloads each once)"
	@echo "make gpu          every test that a GPU can run, with that machine's own python3 and torch (PYTHON=..., ARGS=...)"
	@echo "make reviewed     read every reviewed release anew into tests/hosts/reviewed.json (downloads each once)"
	@echo "make compile-all  every kernel for every chip, all options"
	@echo "make lint         ruff, mypy and codespell"
	@echo "make start-cost   what the start-up file costs an interpreter, over 200 starts"
	@echo "make clean        remove .venv and what the tools left"

# Each stamp is written last, so that a set-up that was cut short starts again.
$(VENV)/made:
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "mla-patch is for Linux x86-64; this is $$(uname -sm)" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' found: install Python 3.10 or later, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "needs Python 3.10 or later, found $$($(PYTHON) -V 2>&1): say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "this Python has no venv module: install it (Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: its CUDA builds pin a Triton of their own, and the tests want the one in constraints.txt.
# pip then says that the two disagree, which is so, and goes on; --no-deps below keeps it from taking that back.
$(VENV)/tools: $(VENV)/made constraints.txt
	@echo "setting up $(VENV) (torch, Triton, test tools): minutes on the first run"
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt build codespell editables hatchling hypothesis mypy numpy prometheus-client pytest \
	  pytest-xdist ruff triton packaging pluggy rich wrapt
	@touch $@

$(VENV)/project: $(VENV)/tools pyproject.toml hatch_build.py mla_patch.pth mla_patch.start
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/project

demo: setup
	@$(PY) -m mla_patch demo --fetch 0.5.11

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib

test: lint
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not cost" --ignore=tests/hosts
	$(PY) -m pytest -m cost $$(grep -rl --include='test_*.py' 'mark\.cost' tests)
	$(PY) -m pytest -n $(WORKERS) -m "not gpu" tests/hosts

hosts: setup
	HOSTS=$${HOSTS:-all} $(PY) -m pytest -n $(WORKERS) tests/hosts

# The GPU's own torch and Triton, which nothing here may touch: no set-up, no .venv.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) tests/gpu.py $(ARGS)

reviewed: setup
	$(PY) tests/hosts/reviewed.py --write

compile-all: setup
	$(PY) tests/compile_matrix.py --every

start-cost: setup
	$(PY) tests/start_cost.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
