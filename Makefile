# make demo   convert and validate the sample        make check      lint, types, import rules, docs
# make test   the test suite but its slow tests      make test-slow  the slow tests
# make bench  speed, memory and size at real size    make docs       write docs/cli.md anew
# make clean  remove what the above made             make api-docs   the API reference, build/api

PYTHON ?= python3
WORKERS ?= 2
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test test-slow check docs api-docs bench venv clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq -c constraints.txt
DEMO := build/demo/lfm2moe-tiny-int4
EXTRAS := test,llama-cpp,mlx,vllm-format,genai,genai-builder,ray

demo: .venv/.runtime
	$(BIN)/lfmq inspect sample
	$(BIN)/lfmq convert sample --output build/demo --sequence 256 --force
	$(BIN)/lfmq validate sample $(DEMO).gguf $(DEMO)-mlx $(DEMO)-onnx --sequence 256

# One thread a worker: two pools of spinning threads on two cores take six times as long.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

test: .venv/.complete
	$(TESTS) -m "not slow" $(PYTEST)

test-slow: .venv/.complete
	$(TESTS) -m slow $(PYTEST)

check: .venv/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python docs/generate_cli.py --check

docs: .venv/.runtime
	$(BIN)/python docs/generate_cli.py

bench: .venv/.complete
	$(BIN)/python benchmarks/sample_quality.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/full_size.py

venv: .venv/.complete

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes in alone and first: later installs find their range satisfied and fetch no other.
.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

.venv/.complete: .venv/.runtime
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

api-docs: .venv/.runtime
	$(PIP) -e '.[docs]'
	$(BIN)/python docs/generate_api.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis
