# `make demo` and `make test` need python3, make and git, and nothing done before.
# Pinned versions of what the checks run with are in constraints.txt.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Other programs that read what moeplan writes, each in an environment of its own, and tests that are not part of `make test`.
GGUF          := .venv-gguf
TRANSFORMERS4 := .venv-transformers4
VLLM          := .venv-vllm

# What the tests do not use is left out of llama.cpp, and what is left is compiled quickly rather than to run fast.
LLAMA_CPP_FLAGS := -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF -DGGML_OPENMP=OFF \
                   -DCMAKE_C_FLAGS_RELEASE=-O2 -DCMAKE_CXX_FLAGS_RELEASE=-O1

.PHONY: demo test lint pytest test-gguf test-transformers4 test-vllm bench bench-smoke bench-routing fuzz clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(READY)
	$(BIN)/python -m pytest -n auto

test-gguf: $(READY) $(GGUF)/.ready
	READER_PYTHON=$(GGUF)/bin/python $(BIN)/python -m pytest -n auto tests/readers/test_gguf.py

test-transformers4: $(READY) $(TRANSFORMERS4)/.ready
	READER_PYTHON=$(TRANSFORMERS4)/bin/python $(BIN)/python -m pytest -n auto tests/readers/test_transformers4.py

test-vllm: $(READY) $(VLLM)/.ready
	READER_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -n auto tests/readers/test_vllm.py

# llama.cpp's converter is no package: it is taken from the source package of llama.cpp's Python bindings.
$(GGUF)/.ready: tests/readers/gguf_requirements.txt
	$(PYTHON) -m venv --clear $(GGUF)
	$(GGUF)/bin/python -m pip install --quiet --upgrade pip
	$(GGUF)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --constraint $< --dest $(GGUF) llama-cpp-python
	mkdir $(GGUF)/source
	tar -xzf $(GGUF)/llama_cpp_python-*.tar.gz -C $(GGUF)/source --strip-components=1
	CMAKE_ARGS="$(LLAMA_CPP_FLAGS)" $(GGUF)/bin/python -m pip install --quiet --no-binary llama-cpp-python --requirement $<
	@touch $@

$(TRANSFORMERS4)/.ready: tests/readers/transformers4_requirements.txt
	$(PYTHON) -m venv --clear $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --quiet --upgrade pip
	$(TRANSFORMERS4)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# vLLM's build for the CPU asks for torch's; where pip knows no index of that, PIP_EXTRA_INDEX_URL names PyTorch's.
# PyPI's torchvision, for another build of torch, cannot be imported beside it; vLLM reads models of text without it.
$(VLLM)/.ready: tests/readers/vllm_requirements.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --requirement $<
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# mergekit-moe, the peer, gets an environment of its own: .venv-peer.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.peer
	$(BIN)/python -m benchmarks

# How well routers route: docs/routing.md. The models are trained once, and kept in .bench/routing/models.
bench-routing: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.peer
	$(BIN)/python -m benchmarks.routing

# How long to fuzz, in seconds.
FUZZ_SECONDS ?= 600

fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

bench-smoke: $(READY)
	$(BIN)/python -m benchmarks --smoke --out .bench/smoke

clean:
	rm -rf $(VENV) $(GGUF) $(TRANSFORMERS4) $(VLLM) .venv-peer .bench .demo .fuzz build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
