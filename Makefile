# 'make' alone prints what there is. Every target sets up what it needs in $(VENV).
PYTHON ?= python3
VENV   ?= .venv
# On a GPU machine PyPI's file of this version is the CUDA build; TORCH=torch takes the newest.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
# Of the tests that run at the same time.
JOBS   ?= 2
SANITIZE ?= address,undefined

.PHONY: help run test lint types check sanitize sdist build doctor clean

help:  ## print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(BIN)/llmkern: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

build: $(BIN)/llmkern  ## set up the environment and build the recorder

run: build  ## set up and run the main job: qwen-7b int8 on a GPU, qwen-tiny on the CPU otherwise
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m llmkern.trace --model qwen-7b --precision int8; \
	else $(BIN)/python -m llmkern.trace --model qwen-tiny --precision int8 --prompt-tokens 64; fi

test: build  ## set up and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: build  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build  ## mypy
	$(BIN)/mypy

check: lint types test  ## what CI runs, but for the sanitizers

sanitize: build  ## the recorder's tests under ASAN and UBSAN (SANITIZE=thread: TSAN)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.sanitized $(SANITIZE) -q

sdist: build  ## a source distribution in dist/
	$(BIN)/python -m build --sdist

doctor: build  ## what works on this machine
	$(BIN)/llmkern doctor

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build *.egg-info llmkern/_recorder*.so
