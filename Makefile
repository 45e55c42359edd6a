# make compare   both twins trained on Shakespeare: table, plot, samples (called again: resumes, or shows them again)
# make test      the whole test suite
# make lint      ruff and mypy
# make test-interop   builds llama.cpp (a quarter of an hour) and runs exported models in it
# make test-arm       the kernels' NEON paths in qemu's emulation (needs qemu-user and gcc-aarch64-linux-gnu)
# Each makes .venv first where it is missing. PYTHON=python3.12 chooses the interpreter, ARGS="..." adds flags.

PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet

.PHONY: compare test test-interop test-arm lint
.DELETE_ON_ERROR:

# A comparison that is there resumes with its own settings; one that ARGS overwrites or puts elsewhere is a new one.
THERE = $(if $(findstring --ov,$(ARGS))$(findstring --out,$(ARGS)),,$(wildcard runs/compare/*/config.json))
compare: .venv/user
	$(PY) compare.py $(if $(THERE),--resume,--config configs/shakespeare.toml) $(ARGS)

test: .venv/developer
	$(PY) -m pytest $(ARGS)

test-interop: .venv/interop
	$(PY) -m pytest -s tests/run_in_llama_cpp.py $(ARGS)

test-arm: .venv/developer
	$(PY) -m pytest tests/run_on_arm.py $(ARGS)

lint: .venv/developer
	$(PY) -m ruff check .
	$(PY) -m mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "BitGPT needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/user: requirements.txt | .venv/bin/python
	@echo "installing requirements.txt (PyTorch is large: minutes on a slow line)"
	$(INSTALL) -r requirements.txt
	@touch $@

.venv/developer: requirements-dev.txt .venv/user
	@echo "installing requirements-dev.txt"
	$(INSTALL) -r requirements-dev.txt
	@touch $@

.venv/interop: requirements-interop.txt .venv/developer
	@echo "installing requirements-interop.txt (builds llama.cpp: a quarter of an hour on two cores)"
	$(INSTALL) -r requirements-interop.txt
	@touch $@
